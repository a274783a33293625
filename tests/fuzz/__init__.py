"""Readers under files that are damaged on purpose: `python -m tests.fuzz N` (`make fuzz N=...`)."""
