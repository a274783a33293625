"""Quantized models as files of other runtimes."""
