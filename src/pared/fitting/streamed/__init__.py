"""Fit of a language model that does not fit in memory: one block of it at a time, in two sweeps."""
