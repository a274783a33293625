"""Checkpoints compressed, and artifacts expanded, by their numbers alone: without torch, and without a model's code."""
