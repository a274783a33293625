"""Copies of a model's structure, with other numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from pared.model.tensors import ModuleT, loose_tensors, registrations


def clone_structure(model: ModuleT, new_tensor: Callable[[Tensor], Tensor] | Mapping[int, Tensor]) -> ModuleT:
    """A deep copy of the model in which other tensors take the place of its parameters and buffers.

    Args:
        model: it is left as it is.
        new_tensor: gives for each registered tensor the one that takes its place: a function, or a mapping by `id`.
    """
    memo: dict[int, object] = {}
    for _, _, loose in loose_tensors(model):
        if loose.grad_fn is not None:  # weight_norm's `weight`: recomputed by its hook, and deepcopy would refuse it
            memo[id(loose)] = loose.detach().clone()
    for module in model.modules():
        for _, tensor, kind, _ in registrations(module):
            if id(tensor) in memo:
                continue
            new = new_tensor[id(tensor)] if isinstance(new_tensor, Mapping) else new_tensor(tensor)
            if kind == "parameter" and not isinstance(new, nn.Parameter):
                new = nn.Parameter(new, requires_grad=False)
            memo[id(tensor)] = new
    clone: ModuleT = copy.deepcopy(model, memo)
    refresh_recurrent(clone)
    return clone


def refresh_recurrent(model: nn.Module) -> None:
    """Let every LSTM and GRU use its present weights: after copying, their weak references point to the old ones."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and all(name in module._parameters for name in module._flat_weights_names):
            module._init_flat_weights()


def shadow(model: ModuleT) -> ModuleT:
    """A copy in eval mode that can be changed without changing the model, as functions of the user may do."""

    def copied(tensor: Tensor) -> Tensor:
        data = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(data, requires_grad=tensor.requires_grad) if is_parameter else data

    return clone_structure(model, copied).eval()
