"""What pickle is given in the place of a quantized model's structure."""
