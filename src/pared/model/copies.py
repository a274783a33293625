"""Copies of a model's structure, with other numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MethodType

from torch import Tensor, nn

from pared.errors import ModelError
from pared.model.copying.copier import Memo
from pared.model.copying.reach import Reach
from pared.model.copying.ties import check_copy
from pared.model.tensors import ModuleT, registrations


def clone_structure(model: ModuleT, new_tensor: Callable[[Tensor], Tensor] | Mapping[int, Tensor]) -> ModuleT:
    """A deep copy of the model in which other tensors take the place of its parameters and buffers.

    Nothing in the copy refers to the model: functions are made again with what they close over, locks are new, tensors
    in the memory of a weight are in that of the new one, and those with a graph lose it. Handles that cannot be
    copied and lead to no tensors, such as files, are shared.

    Args:
        model: it is left as it is.
        new_tensor: gives for each registered tensor the one that takes its place: a function, or a mapping by `id`.

    Raises:
        ModelError: an attribute cannot be copied, or the copy would still refer to the model.
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
    try:
        clone: ModuleT = copy.deepcopy(model, Memo(reach, tensors))
    except RecursionError as error:
        raise ModelError(
            "its modules refer to each other in a chain that is too long to be copied",
            where=type(model).__name__,
            remedy="Set attributes that lead from module to module to None before, or raise sys.setrecursionlimit.",
        ) from error
    _forget_plain_forwards(clone)
    refresh_recurrent(clone)
    check_copy(reach, clone)
    return clone


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
