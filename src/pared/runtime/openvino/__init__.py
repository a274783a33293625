"""A quantized model's graph in OpenVINO, converted in memory: integer weights, and inputs on their calibrated grids."""
