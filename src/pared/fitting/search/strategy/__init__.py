"""Which model the search tries next."""
