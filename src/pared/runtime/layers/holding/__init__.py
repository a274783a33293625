"""What a counterpart holds instead of float weights."""
