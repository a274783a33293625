"""Checkpoints rounded to the formats of a runtime and written as it reads them, without the model's code or data."""
