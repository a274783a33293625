"""What ONNX Runtime computes faster than PyTorch, where it is installed: LSTMs on int8 weights."""
