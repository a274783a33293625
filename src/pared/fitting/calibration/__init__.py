"""What calibration calls show: the inputs of layers, and what an error in each weight costs."""
