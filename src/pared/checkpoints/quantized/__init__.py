"""Checkpoints that another tool has quantized already: nothing of them may be rounded again."""
