"""Weights in an ONNX graph: which values they are, how operators move them, and how they are written."""
