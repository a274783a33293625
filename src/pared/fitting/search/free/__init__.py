"""What the allocation decides about: tensors on grids of their own, and on those that another runtime executes."""
