"""Codes that stay the bytes of a file, and are decoded whenever they are asked for."""
