"""The tensors of a model: every parameter and buffer once, with all of its names and its view as a matrix."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from pared.formats.coded import RAW_TYPES, Coded, on_own_grid
from pared.formats.dtypes import FLOATING
from pared.formats.views import View, view_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ModuleT_co = TypeVar("ModuleT_co", bound=nn.Module, covariant=True)

GRID_SOURCES = tuple(RAW_TYPES[name] for name in FLOATING)


@dataclass(frozen=True, eq=False)
class ModelTensor:
    """One tensor of a model.

    Args:
        names: every dotted name it goes by; more than one where it is tied.
        objects: the model's own tensor; several objects where distinct parameters share one storage.
        kind: whether it is registered as a parameter or as a buffer.
        persistent: whether it is in the model's `state_dict`.
        module: the module that owns its first name.
        view: which of its dimensions count rows, with one step each on a grid, and which count columns.
        groups: how many equal runs of its rows have inputs of their own; None: as many as the module says.
    """

    names: tuple[str, ...]
    objects: tuple[Tensor, ...]
    kind: Literal["parameter", "buffer"]
    persistent: bool
    module: nn.Module
    view: View
    groups: int | None = None

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
    def normed(self) -> tuple[int, ...] | None:
        """The dimensions whose slices the module divides by their norms; () if by that of the whole; None if by none.

        weight_norm and spectral_norm do so, and other parametrizations may: a slice of zeros would give 0 / 0.
        """
        if self.tensor.numel() == self.tensor.shape[:1].numel():  # a bias, or the gains of weight_norm
            return None
        if isinstance(self.module, ParametrizationList):
            known = [normed for own in self.module if (normed := _normed(own)) is not None]
            return known[0] if known else (0,)
        hooks = [hook for hook in self.module._forward_pre_hooks.values() if _normed(hook) is not None]
        ours = [hook for hook in hooks if self.attribute in (f"{hook.name}_v", f"{hook.name}_orig")]  # type: ignore[attr-defined]  # both have it
        return _normed(ours[0]) if ours else None

    @property
    def weight_like(self) -> bool:
        """A floating tensor of two or more dimensions in the state dict: it belongs on a grid."""
        return self.persistent and self.tensor.dim() >= 2 and self.tensor.dtype in GRID_SOURCES

    @property
    def fits_grid(self) -> bool:
        """Weight-like, or a parameter of one dimension (a bias, the scale of a norm); and not empty."""
        flat = self.kind == "parameter" and self.tensor.dim() == 1 and self.tensor.dtype in GRID_SOURCES
        return self.tensor.numel() > 0 and (self.weight_like or flat)

    @functools.cached_property
    def own_grid(self) -> Coded | None:
        """The tensor, which is finite, on the grid that its numbers lie on already; None if there is none."""
        return on_own_grid(self.tensor) if self.weight_like and not self.tensor.is_meta else None


def _normed(hook: object) -> tuple[int, ...] | None:
    """The dimension of a weight_norm, () of a norm of the whole tensor; None for anything else."""
    name = type(hook).__name__.removeprefix("_")  # the classes of parametrizations are private
    if name == "WeightNorm" and type(hook).__module__.startswith("torch."):
        dim = getattr(hook, "dim", -1)
        return () if dim in (None, -1) else (dim,)
    return () if name == "SpectralNorm" and type(hook).__module__.startswith("torch.") else None


@dataclass(frozen=True, eq=False)
class ModelTensors(Generic[ModuleT_co]):
    """A model with its tensors, which are found once and handed on. It iterates over them, in the model's order.

    Args:
        model: the model.
        tensors: every parameter and buffer of it once.
    """

    model: ModuleT_co
    tensors: tuple[ModelTensor, ...]

    def __iter__(self) -> Iterator[ModelTensor]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @functools.cached_property
    def names(self) -> Mapping[int, str]:
        """The first name of each tensor, by the `id` of every object that is this tensor."""
        return {id(an_object): tensor.name for tensor in self for an_object in tensor.objects}

    @property
    def numbers(self) -> int:
        """How many numbers all tensors have."""
        return sum(tensor.tensor.numel() for tensor in self)

    def in_copy(self, model: ModuleT) -> ModelTensors[ModuleT]:
        """The tensors of the same names in a copy of the model."""
        known = dict(named_tensors(model))

        def copied(tensor: ModelTensor) -> ModelTensor:
            objects = {id(known[name]): known[name] for name in tensor.names}
            module = model.get_submodule(tensor.name.rpartition(".")[0])
            return replace(tensor, objects=tuple(objects.values()), module=module)

        return ModelTensors(model, tuple(map(copied, self)))


def find_tensors(model: ModuleT) -> ModelTensors[ModuleT]:
    """Every parameter and buffer of the model once, in the model's order.

    Two names are one tensor if they are the same object, or the same place in memory with the same shape, strides and
    dtype.

    >>> a = nn.Linear(2, 2, bias=False)
    >>> [tensor.names for tensor in find_tensors(nn.ModuleDict({"x": a, "y": a}))]
    [('x.weight', 'y.weight')]
    """
    found: dict[object, ModelTensor] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor, kind, persistent in registrations(module):
            name = f"{module_name}.{attribute}" if module_name else attribute
            key = _identity(tensor)
            known = found.get(key)
            if known is None:
                view = view_of(module, attribute, tuple(tensor.shape))
                found[key] = ModelTensor((name,), (tensor,), kind, persistent, module, view)
            else:
                others = () if any(tensor is an_object for an_object in known.objects) else (tensor,)
                found[key] = replace(
                    known,
                    names=(*known.names, name),
                    objects=known.objects + others,
                    persistent=known.persistent or persistent,
                )
    return ModelTensors(model, tuple(found.values()))


def _identity(tensor: Tensor) -> object:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def registrations(module: nn.Module) -> Iterator[tuple[str, Tensor, Literal["parameter", "buffer"], bool]]:
    """A module's own parameters and buffers: attribute, tensor, kind, and whether the state dict holds it."""
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield attribute, parameter, "parameter", True
    for attribute, buffer in module._buffers.items():
        if buffer is not None:
            yield attribute, buffer, "buffer", attribute not in module._non_persistent_buffers_set


def registered(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers by attribute, without those of its children."""
    for attribute, tensor, _, _ in registrations(module):
        yield attribute, tensor


def registered_as(module: nn.Module, attribute: str) -> Tensor:
    """The module's own parameter or buffer of this name."""
    parameter = module._parameters.get(attribute)
    return module.get_buffer(attribute) if parameter is None else parameter


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 if torch does not count it."""
    return 0 if tensor.is_inference() else tensor._version


def tensor_count(model: nn.Module) -> int:
    """How many parameters and buffers the modules have, tied ones as often as they are registered.

    The modules may nest deeper than Python calls itself.
    """
    found: dict[int, Mapping[str, Any]] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = vars(module)
            waiting += vars(module).get("_modules", {}).values()
    return sum(len(known.get("_parameters", ())) + len(known.get("_buffers", ())) for known in found.values())


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of the model, under each of its names."""
    for module_name, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in registered(module):
            yield (f"{module_name}.{attribute}" if module_name else attribute), tensor
