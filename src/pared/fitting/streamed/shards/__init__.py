"""Blocks run over some of the calls at a time, here or by workers."""
