"""`make bench-scale`: what workers cost and gain on this machine, and what follows for many machines."""
