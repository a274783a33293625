"""The artifact's container: its two records, its index, and files that are written whole or not at all."""
