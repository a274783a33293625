"""The damage that a result does on recorded calls, beside the predicted one, and what is refined where they differ."""
