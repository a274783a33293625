"""What a model keeps beside the tensors of its state dict: state of other types, and buffers that are computed."""
