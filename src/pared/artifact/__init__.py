"""The file that pared writes: its index, its parts, and what it records of the search."""
