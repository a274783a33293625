"""What is in a file, why it is so large, and how two of them differ."""
