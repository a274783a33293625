"""Checkpoints compressed and expanded without the model's code, and without torch."""
