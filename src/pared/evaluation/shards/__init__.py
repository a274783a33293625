"""Models run over some windows of a text at a time, here or by workers."""
