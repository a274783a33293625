"""What runs the codes: kernels, layers, graphs, other runtimes, and the quantized model."""
