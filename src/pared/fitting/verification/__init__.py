"""What is run to see that nothing went wrong: that copies use their own weights, and that files give the same model."""
