"""Folders of weights: which files are one model, whether all of them are there, and their tensors as one listing."""
