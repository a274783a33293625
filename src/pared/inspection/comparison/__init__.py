"""How two models differ: in their tensors, and where their outputs diverge."""
