"""ONNX: a quantized model as a graph of standard operators, its weights as codes and steps."""
