"""What errors cost is turned into an artifact: what each tensor could become, what of it is taken, and the bytes."""
