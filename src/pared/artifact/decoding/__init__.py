"""The numbers of an artifact's tensors, without torch: whole tensors, or piece by piece."""
