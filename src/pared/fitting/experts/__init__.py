"""Mixtures of experts: which tensors are experts, what chooses among them, and what is known of the rare ones."""
