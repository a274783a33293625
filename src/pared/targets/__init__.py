"""Other runtimes: what they execute, and files as they read them."""
