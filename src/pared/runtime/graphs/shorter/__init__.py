"""Fewer operators where each does little: in a step of decoding, calling them takes longer than what they compute."""
