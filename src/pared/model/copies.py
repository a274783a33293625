"""Copies of a model's structure, with other numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pared.errors import ModelError
from pared.model.copying.caches import drop_caches
from pared.model.copying.copier import Memo
from pared.model.copying.reach import Reach
from pared.model.copying.ties import check_copy
from pared.model.tensors import ModuleT, registrations


def clone_structure(
    model: ModuleT, new_tensor: Callable[[Tensor], Tensor] | Mapping[int, Tensor], into: ModuleT | None = None
) -> ModuleT:
    """A deep copy of the model in which other tensors take the place of its parameters and buffers.

    Nothing in the copy refers to the model: functions are made again with what they close over, locks are new, tensors
    in the memory of a weight are in that of the new one, and those with a graph lose it. Handles that cannot be
    copied and lead to no tensors, such as files, are shared. What a class keeps of its weights until `train` is called
    is dropped.

    Args:
        model: it is left as it is.
        new_tensor: gives for each registered tensor the one that takes its place: a function, or a mapping by `id`.
        into: an object of the model's own class that becomes the copy, for callers who hold it already; what it was is
            lost. None: a new one does.

    Raises:
        ModelError: an attribute cannot be copied, or the copy would still refer to the model; or `into` is given, and
            the class says itself how its objects are copied.
    """
    reach = Reach(model)
    tensors: dict[int, Tensor] = {}
    for module in reach.modules:
        for _, tensor, kind, _ in registrations(module):
            if id(tensor) in tensors:
                continue
            new = new_tensor[id(tensor)] if isinstance(new_tensor, Mapping) else new_tensor(tensor)
            if kind == "parameter" and not isinstance(new, nn.Parameter):
                new = nn.Parameter(new, requires_grad=False)
            tensors[id(tensor)] = new
    clone = _copied(reach, Memo(reach, tensors, into))
    if into is not None and clone is not into:
        raise ModelError(
            "its class copies its objects in a way of its own, so that none can become the quantized model in place",
            where=type(model).__name__,
            remedy="Open it with pared.load(directory, model=...), which makes a new object.",
        )
    return clone


def _copied(reach: Reach[ModuleT], memo: Memo) -> ModuleT:
    try:
        clone: ModuleT = copy.deepcopy(reach.model, memo)
    except RecursionError as error:
        raise ModelError(
            "its objects refer to each other in a chain that is too long to be copied",
            where=type(reach.model).__name__,
            remedy="Set attributes that lead from object to object to None before, or raise sys.setrecursionlimit.",
        ) from error
    _forget_plain_forwards(clone)
    refresh_recurrent(clone)
    check_copy(reach, clone)
    drop_caches(reach, clone)
    return clone


def deep_copy(model: ModuleT, memo: dict[int, Any]) -> ModuleT:
    """What `copy.deepcopy` is to give for a model, as its `__deepcopy__`: a copy as by `clone_structure`.

    Args:
        model: it is left as it is.
        memo: that of the deep copy which the model is part of.

    Raises:
        ModelError: see `clone_structure`.
    """
    reach = Reach(model)
    own = Memo(reach, {})
    own.update(memo)
    for key, tensor in reach.registered.items():
        if key not in own:
            own[key] = copy.deepcopy(tensor if tensor.grad_fn is None else tensor.detach(), {})
    clone = _copied(reach, own)
    memo.setdefault(id(memo), []).append(reach)  # whose objects must live as long as the memo
    memo.update({key: value for key, value in own.items() if key != id(own) and key not in memo})
    return clone


def is_guarded(memo: Mapping[int, Any]) -> bool:
    """Whether the memo of a deep copy is one of ours, which goes on with the copy of a whole model."""
    return isinstance(memo, Memo)


def check_copyable(model: nn.Module) -> None:
    """Refuse a model of which no copy can be made that is independent of it.

    Raises:
        ModelError: see `clone_structure`.
    """
    clone_structure(model, lambda tensor: torch.empty_like(tensor, device="meta"))


def _forget_plain_forwards(model: nn.Module) -> None:
    """A `forward` on a module that is only the method of its class would hide those of the classes mixed in before."""
    for module in model.modules():
        own = vars(module).get("forward")
        if isinstance(own, MethodType) and own.__self__ is module and own.__func__ is type(module).forward:
            del vars(module)["forward"]


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
