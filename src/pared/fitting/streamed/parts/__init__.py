"""A model in parts: its blocks and what is around them, the weights of each, and how each runs on its own."""
