"""Which tensors of a model are experts, and which ones choose among them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torch import nn

from pared.model.tensors import ModelTensors, registered

_EXPERTS: Final = re.compile(r"(?i)expert")


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer.

    Args:
        name: the path of the module that holds them all.
        count: how many there are.
        tensors: for each kind of weight its name, or those of all experts in turn: one name is a stack of matrices.
        routers: the names of the tensors that choose among them.
    """

    name: str
    count: int
    tensors: tuple[tuple[str, ...], ...]
    routers: tuple[str, ...]


def mixtures(tensors: ModelTensors[nn.Module]) -> tuple[Mixture, ...]:
    """The mixtures of a model, by structure: modules called after experts, stacked in one or each of its own.

    What chooses among E experts is a matrix of E rows beside them, and its bias.

    Args:
        tensors: those of the model; a skeleton without numbers will do.
    """
    first = {name: tensor.name for tensor in tensors for name in tensor.names}
    found = []
    for name, parent in tensors.model.named_modules():
        for attribute, child in parent.named_children():
            if not (_EXPERTS.search(attribute) or _EXPERTS.search(type(child).__name__)):
                continue
            place = f"{name}.{attribute}" if name else attribute
            count, kinds = _apart(child) or _stacked(child)
            if count < 2:
                continue
            named = tuple(tuple(first[f"{place}.{one}"] for one in kind) for kind in kinds)
            found.append(Mixture(place, count, named, tuple(_routers(parent, child, name, count))))
    return tuple(found)


def _apart(holder: nn.Module) -> tuple[int, list[tuple[str, ...]]] | None:
    """The number of experts that are modules of their own, all alike, and the names of their parameters by kind."""
    if not isinstance(holder, (nn.ModuleList, nn.ModuleDict)) or len(holder) < 2:
        return None
    members = [(name, dict(one.named_parameters())) for name, one in holder.named_children()]
    shapes = [{name: parameter.shape for name, parameter in own.items()} for _, own in members]
    if not shapes[0] or any(other != shapes[0] for other in shapes):
        return None
    return len(members), [tuple(f"{member}.{name}" for member, _ in members) for name in shapes[0]]


def _stacked(holder: nn.Module) -> tuple[int, list[tuple[str, ...]]]:
    """The number of experts in the module's own parameters, and their names; 0 if there are none."""
    own = {name: tensor for name, tensor in registered(holder) if isinstance(tensor, nn.Parameter)}
    counts = {tensor.shape[0] for tensor in own.values() if tensor.dim() == 3}
    if len(counts) != 1:
        return 0, []
    count = counts.pop()
    return count, [(name,) for name, tensor in own.items() if tensor.dim() == 3 and tensor.shape[0] == count]


def _routers(parent: nn.Module, experts: nn.Module, name: str, count: int) -> Iterator[str]:
    """The names of the tensors of `count` rows beside the experts."""
    inside = {id(module) for module in experts.modules()}
    for place, module in parent.named_modules(prefix=name):
        if id(module) in inside:
            continue
        own = dict(registered(module))
        if any(tensor.dim() == 2 and tensor.shape[0] == count for tensor in own.values()):
            for attribute, tensor in own.items():
                if tensor.dim() in (1, 2) and tensor.shape[0] == count:
                    yield f"{place}.{attribute}" if place else attribute
