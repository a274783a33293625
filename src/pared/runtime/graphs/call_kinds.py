"""Ways of calling a model: names, types and ranks of its arguments, and the values of those that are no tensors.

A graph is made for one way of calling and serves no other.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

_CONSTANTS: Final = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Argument:
    """One argument of a call.

    Args:
        name: of the parameter of `forward`.
        dtype: of a tensor, "float32" for instance; empty for a constant.
        shape: of a tensor.
        value: of a constant.
    """

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    value: bool | float | str | None = None

    def __post_init__(self) -> None:
        """Refuse what no tensor has: `engine.json` may say anything."""
        known = not self.dtype or isinstance(getattr(torch, self.dtype, None), torch.dtype)
        if not known or not all(type(size) is int and size >= 0 for size in self.shape):
            raise ValueError(f"no tensor is {self.dtype} {self.shape}")

    @property
    def way(self) -> tuple[object, ...]:
        """What `way_of` says of it."""
        if self.dtype:
            return self.name, getattr(torch, self.dtype), len(self.shape)
        return self.name, type(self.value), self.value

    @property
    def kind(self) -> str:
        """What two calls must share to be of one way.

        >>> Argument("ids", "int64", (2, 7)).kind, Argument("causal", value=True).kind
        ('ids: int64[2]', 'causal = True')
        """
        return f"{self.name}: {self.dtype}[{len(self.shape)}]" if self.dtype else f"{self.name} = {self.value!r}"

    def example(self) -> object:
        """The constant, or a tensor of zeros."""
        return torch.zeros(self.shape, dtype=getattr(torch, self.dtype)) if self.dtype else self.value


Bound = dict[str, Any]  # the arguments of a call by name, in alphabetical order


def parameters_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the arguments that `forward` takes by position or by name."""
    kinds = inspect.signature(model.forward).parameters.values()
    if any(one.kind is one.POSITIONAL_ONLY for one in kinds):
        return ()  # no argument that is given by position can be given by name
    return tuple(one.name for one in kinds if one.kind is one.POSITIONAL_OR_KEYWORD)


def bind(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Bound | None:
    """The arguments by name; None where some have none or two, or are neither plain tensors on the CPU nor constants.

    >>> list(bind(("x", "scale"), (torch.zeros(1),), {"scale": 2.0}))
    ['scale', 'x']
    """
    if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
        return None
    bound = dict(zip(names, args, strict=False)) | dict(kwargs)
    for value in bound.values():
        if type(value) is Tensor:
            if value.layout is not torch.strided or not value.is_cpu or value.is_quantized:
                return None
        elif type(value) not in _CONSTANTS:
            return None
    return {name: bound[name] for name in sorted(bound)}


def way_of(bound: Bound) -> tuple[object, ...]:
    """What two calls share that the same graph may serve."""
    return tuple(
        (name, value.dtype, value.dim()) if type(value) is Tensor else (name, type(value), value)
        for name, value in bound.items()
    )


def tensors_of(way: tuple[object, ...]) -> tuple[object, ...]:
    """What a way says of tensors.

    >>> tensors_of(way_of({"causal": True, "x": torch.zeros(2, 3)}))
    (('x', torch.float32, 2),)
    """
    return tuple(one for one in way if isinstance(one, tuple) and isinstance(one[1], torch.dtype))


def arguments_of(bound: Bound) -> tuple[Argument, ...]:
    """A call as plain data: shapes and constants, no numbers."""
    return tuple(
        Argument(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
        if type(value) is Tensor
        else Argument(name, value=value)
        for name, value in bound.items()
    )


def text_of(arguments: Sequence[Argument]) -> str:
    """A way of calling, for people and as a key of JSON.

    >>> text_of([Argument("ids", "int64", (2, 7)), Argument("causal", value=True)])
    'ids: int64[2], causal = True'
    """
    return ", ".join(one.kind for one in arguments)
