"""Which calls a graph answers in place of the modules."""
