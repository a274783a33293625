"""How fast parts of a model are on this machine."""
