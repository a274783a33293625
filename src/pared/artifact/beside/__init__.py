"""What stands beside the tensors of a state dict: in an index, and other files in a folder."""
