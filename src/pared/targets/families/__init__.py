"""What is known of architectures: which layers share an input, and what feeds them."""
