"""What a model refers to, and how each kind of object in it is copied."""
