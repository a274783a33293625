"""Whether a copy of the model computes with its own weights: one call is made, and what it reads is noted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pared.errors import ModelError, reason_of
from pared.model.calls import Call, smallest_like_first
from pared.model.copies import shadow
from pared.model.copying.reach import Reach, is_plain, memory_of
from pared.model.outputs import tensors_of
from pared.model.tensors import ModelTensors, named_tensors
from pared.switches import random_states_kept

log = logging.getLogger(__name__)

_ALIKE: Final = 0.5  # correlation from which on a tensor was computed from a weight
_FEW: Final = 16  # numbers: of fewer, a correlation says nothing


class _Reads(TorchDispatchMode):
    """Notes the memory of every tensor that an operator gets and does not just look at in another way."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.memory: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator."""
        output = func(*args, **(kwargs or {}))
        self.memory |= _memories((args, kwargs)) - _memories(output)
        return output


def _memories(value: object) -> set[int]:
    return {memory_of(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and is_plain(leaf)}


def check_weights(tensors: ModelTensors[nn.Module], calls: Sequence[Call]) -> None:
    """Refuse a model whose copies do not compute with their own weights: no change of these would be noticed.

    Args:
        tensors: those of the model, which is left as it is.
        calls: what calibration saw; the smallest like the first of them is made once more, on a copy.

    Raises:
        ModelError: a copy reads weights of the model; or it reads none at all; or it reads tensors that were computed
            from weights before, or parameters that no state dict holds.
    """
    if not calls:
        return
    copied = shadow(tensors.model)
    reach = Reach(copied)
    kept = {key: one for key, one in reach.tensors.items() if key not in reach.registered}
    reads, call = _Reads(), smallest_like_first(calls)
    try:
        with torch.no_grad(), random_states_kept(), reads:
            output = call.on(copied)
    except Exception as error:  # noqa: BLE001  # an operator that no mode may watch
        log.warning("whether copies use their own weights could not be checked: %s", reason_of(error))
        return
    own = {name: tensor for name, tensor in named_tensors(copied) if is_plain(tensor) and tensor.is_floating_point()}
    _refuse_reads_of_the_model(tensors, {memory_of(tensor) for tensor in own.values()}, reads.memory)
    unread = {name: tensor for name, tensor in own.items() if memory_of(tensor) not in reads.memory}
    if own and len(unread) == len(own) and tensors_of(output):
        raise ModelError(
            "no weight is read when a copy runs on the first calibration call: the output comes from somewhere else",
            where=type(tensors.model).__name__,
            remedy="Look for an output that is kept from an earlier call, or a forward that runs in another engine.",
        )
    known = {memory_of(tensor) for tensor in own.values()}
    for key, tensor in kept.items():
        if is_plain(tensor) and memory_of(tensor) in reads.memory and memory_of(tensor) not in known:
            _refuse_stand_in(reach.places[key], tensor, unread)


def _refuse_reads_of_the_model(tensors: ModelTensors[nn.Module], own: set[int], read: set[int]) -> None:
    elsewhere = read - own
    for tensor in tensors:
        if is_plain(tensor.tensor) and memory_of(tensor.tensor) in elsewhere:
            raise ModelError(
                "is read from the model itself when a copy of the model runs: other weights in the copy have no effect",
                where=tensor.name,
                remedy="Look for a function or a global variable that refers to the model or its layers, and use "
                "`self` in its place.",
            )


def _refuse_stand_in(place: str, tensor: Tensor, unread: Mapping[str, Tensor]) -> None:
    """Refuse a tensor that is read in the place of weights: one computed from them, or parameters of its own."""
    if isinstance(tensor, nn.Parameter):
        raise ModelError(
            "is or holds a parameter that the model reads and that is not registered, so no file would hold it",
            where=place,
            remedy="Assign it to an attribute of the module, or put layers into an nn.ModuleList or nn.ModuleDict.",
        )
    for name, weight in unread.items():
        if weight.dim() > 1 and any(_alike(weight, form) for form in _forms(tensor, weight)):
            raise ModelError(
                f"is read in the place of {name}, from which it was computed before: other weights have no effect",
                where=place,
                remedy="Set the attribute to None, or whatever lets the model compute it again, before.",
            )


def _forms(tensor: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """The tensor in the layout of a weight; or the part of it that begins where the weight's first row is found."""
    flat = tensor.detach()
    for one in (flat, flat.mT) if flat.dim() > 1 else (flat,):
        if one.numel() == weight.numel():
            yield one
        elif one.dim() == weight.dim() and one.shape[1:] == weight.shape[1:] and len(one) > len(weight):
            starts = (one == weight[0]).flatten(1).all(1).nonzero().flatten().tolist()
            yield from (one[start : start + len(weight)] for start in starts if start + len(weight) <= len(one))


def _alike(weight: Tensor, other: Tensor) -> bool:
    a, b = weight.detach().flatten().double(), other.flatten().double()
    if torch.equal(a, b):
        return True
    if len(a) < _FEW:
        return False
    a, b = a - a.mean(), b - b.mean()
    return bool((a @ b).abs() > _ALIKE * a.norm() * b.norm())
