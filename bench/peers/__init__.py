"""`make bench-peers`: the same models through the tools that people would use instead, each in its own environment."""
