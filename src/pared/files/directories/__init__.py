"""Directories that are written to: who owns one, and what is there only for a while."""
