"""Gradients along random directions of a model's outputs, or of a part's, summed up as they come."""
