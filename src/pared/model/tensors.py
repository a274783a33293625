"""Which tensors a model has: every parameter and buffer once, with all the names it goes by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor of a model.

    Args:
        names: every dotted name it goes by; more than one where it is tied.
        objects: the model's own tensor; several objects where distinct parameters share one storage.
        kind: whether it is registered as a parameter or as a buffer.
        persistent: whether it is in the model's `state_dict`.
        module: the module that owns its first name.
    """

    names: tuple[str, ...]
    objects: tuple[Tensor, ...]
    kind: Literal["parameter", "buffer"]
    persistent: bool
    module: nn.Module

    @property
    def name(self) -> str:
        """The first name: the tensor's name in plans, tables and files."""
        return self.names[0]

    @property
    def tensor(self) -> Tensor:
        """The numbers."""
        return self.objects[0]

    @property
    def attribute(self) -> str:
        """The tensor's name within the module that owns it."""
        return self.name.rpartition(".")[2]

    @property
    def weight_like(self) -> bool:
        """A floating tensor of two or more dimensions that the model's own state holds: it belongs on a grid."""
        return self.persistent and self.tensor.dim() >= 2 and self.tensor.dtype in GRID_SOURCES

    @property
    def fits_grid(self) -> bool:
        """Weight-like, or a parameter of one dimension: a bias, a norm's scale."""
        flat = self.kind == "parameter" and self.tensor.dim() == 1 and self.tensor.dtype in GRID_SOURCES
        return self.tensor.numel() > 0 and (self.weight_like or flat)


# float64 is kept exactly: whoever chose it needs more than a grid gives.
GRID_SOURCES = (torch.float32, torch.float16, torch.bfloat16)


def find_tensors(model: nn.Module) -> tuple[Slot, ...]:
    """Every parameter and buffer of the model once, in the model's order.

    Two names share a slot if they are one tensor: the same object, or the same place in memory with the same
    shape, strides and type.

    >>> a = nn.Linear(2, 2, bias=False)
    >>> [slot.names for slot in find_tensors(nn.ModuleDict({"x": a, "y": a}))]
    [('x.weight', 'y.weight')]
    """
    found: dict[object, Slot] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor, kind, persistent in registrations(module):
            name = f"{module_name}.{attribute}" if module_name else attribute
            key = _identity(tensor)
            known = found.get(key)
            if known is None:
                found[key] = Slot((name,), (tensor,), kind, persistent, module)
            else:
                others = () if any(tensor is one for one in known.objects) else (tensor,)
                found[key] = replace(
                    known,
                    names=(*known.names, name),
                    objects=known.objects + others,
                    persistent=known.persistent or persistent,
                )
    return tuple(found.values())


def registrations(module: nn.Module) -> Iterator[tuple[str, Tensor, Literal["parameter", "buffer"], bool]]:
    """A module's own parameters and buffers: attribute, tensor, kind, and whether the state dict holds it."""
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield attribute, parameter, "parameter", True
    for attribute, buffer in module._buffers.items():
        if buffer is not None:
            yield attribute, buffer, "buffer", attribute not in module._non_persistent_buffers_set


def _identity(tensor: Tensor) -> object:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def registered(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers by attribute, those of its children left out."""
    for attribute, tensor, _, _ in registrations(module):
        yield attribute, tensor


def loose_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Tensors that stand in a module as plain attributes: in no state dict, but part of the model all the same."""
    for module in model.modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor):
                yield module, attribute, value


def held_elsewhere(model: nn.Module) -> set[int]:
    """The identities of tensors that modules also hold in attributes of their own: in lists, dicts or by themselves."""
    registries = ("_parameters", "_buffers", "_modules", "_flat_weights")  # the last is an LSTM's, which is renewed
    return {
        id(leaf)
        for module in model.modules()
        for attribute, value in vars(module).items()
        if attribute not in registries
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor)
    }
