"""What a call is made with, and what it changes, as values that can be kept: arguments, and the state of a model."""
