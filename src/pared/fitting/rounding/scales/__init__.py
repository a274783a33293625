"""Scales of a weight's columns: which it could have, and whether they pay."""
