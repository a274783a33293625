"""What an index says beside the tensors of a state dict."""
