"""Copies of a model that share its structure and not its numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from pared.model.tensors import ModuleT, loose_tensors, registrations


def clone_structure(model: ModuleT, new_tensor: Callable[[Tensor], Tensor] | Mapping[int, Tensor]) -> ModuleT:
    """A deep copy of the model whose parameters and buffers are not copied but replaced.

    Args:
        model: left as it is.
        new_tensor: called with each registered tensor, gives the one that takes its place; or a mapping from `id`.
    """
    memo: dict[int, object] = {}
    for _, attribute, loose in loose_tensors(model):
        if loose.grad_fn is not None:  # weight_norm's `weight`: recomputed by its hook, and deepcopy would refuse it
            memo[id(loose)] = loose.detach().clone()
        del attribute
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
    """Let every LSTM and GRU look at its present weights: they keep weak references that copying leaves stale."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and all(name in module._parameters for name in module._flat_weights_names):
            module._init_flat_weights()


def shadow(model: ModuleT) -> ModuleT:
    """A copy in eval mode, for functions of the user, which may do with it what they like."""

    def copied(tensor: Tensor) -> Tensor:
        data = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(data, requires_grad=tensor.requires_grad) if is_parameter else data

    return clone_structure(model, copied).eval()
