"""Call kinds: the names, types and ranks of a call's tensors, and the values of its other arguments.

A graph is made for one kind of call and serves no other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.files.checks import Place

_CONSTANTS: Final = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Argument:
    """One argument of a call: a tensor, or a constant.

    Args:
        name: the name of the parameter of `forward`.
        dtype: the type of a tensor, such as "float32"; empty for a constant.
        shape: the shape of a tensor.
        value: the value of a constant.
    """

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    value: bool | float | str | None = None

    @classmethod
    def from_json(cls, data: object, at: Place) -> Argument:
        """The inverse of `dataclasses.asdict`. Raises CorruptError for anything else: a file may hold anything."""
        known = at.fields(data, "an argument", [one.name for one in fields(cls)])
        dtype, value = at.text(known["dtype"], "its type"), known["value"]
        if dtype and not isinstance(getattr(torch, dtype, None), torch.dtype):
            at.fail(f"no tensor can be of type {dtype[:80]!r}")
        if isinstance(value, str):
            at.text(value, "its value")
        elif value is not None and type(value) is not bool:
            value = at.number(value, "its value") if type(value) is float else at.integer(value, "its value")
        return cls(at.text(known["name"], "its name"), dtype, at.shape(known["shape"], "shape"), value)

    @property
    def nbytes(self) -> int:
        """The bytes of a tensor like that of the call; 0 for a constant."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize if self.dtype else 0

    @property
    def kind(self) -> tuple[object, ...]:
        """The argument's share of `kind_of`."""
        if self.dtype:
            return self.name, getattr(torch, self.dtype), len(self.shape)
        return self.name, type(self.value), self.value

    def __str__(self) -> str:
        """The argument's share of `describe_kind`.

        >>> print(Argument("ids", "int64", (2, 7)), Argument("causal", value=True), sep=", ")
        ids: int64[2], causal = True
        """
        return f"{self.name}: {self.dtype}[{len(self.shape)}]" if self.dtype else f"{self.name} = {self.value!r}"

    def example(self) -> object:
        """An example: the constant, or a tensor of zeros."""
        return torch.zeros(self.shape, dtype=getattr(torch, self.dtype)) if self.dtype else self.value


Bound = dict[str, Any]  # the arguments of a call by name, in alphabetical order


def parameters_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that `forward` takes by position or by name; none if it has positional-only ones."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        return ()  # graphs are called by name
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def bind(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Bound | None:
    """The arguments by name; None for a call that no graph serves.

    No graph serves an argument that is given twice or without a name, or that is neither a plain tensor on the CPU nor
    a constant.

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


def unknown_output(output: object) -> str:
    """Why no graph can give the output of a call, in words; empty if nothing in it says so.

    >>> unknown_output({"logits": torch.zeros(2), "cache": iter(())})
    'its output holds: tuple_iterator'
    """
    kinds = {type(leaf).__name__ for leaf in tree_leaves(output) if not isinstance(leaf, (Tensor, *_CONSTANTS))}
    return f"its output holds: {min(kinds)}" if kinds else ""


def kind_of(bound: Bound) -> tuple[object, ...]:
    """The kind of a call: calls of one kind may be served by the same graph."""
    return tuple(
        (name, value.dtype, value.dim()) if type(value) is Tensor else (name, type(value), value)
        for name, value in bound.items()
    )


def tensors_of(kind: tuple[object, ...]) -> tuple[object, ...]:
    """The part of a call kind that concerns tensors.

    >>> tensors_of(kind_of({"causal": True, "x": torch.zeros(2, 3)}))
    (('x', torch.float32, 2),)
    """
    return tuple(part for part in kind if isinstance(part, tuple) and isinstance(part[1], torch.dtype))


def arguments_of(bound: Bound) -> tuple[Argument, ...]:
    """A call as plain data: the tensors' types and shapes, and the constants."""
    return tuple(
        Argument(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
        if type(value) is Tensor
        else Argument(name, value=value)
        for name, value in bound.items()
    )


def describe_kind(arguments: Sequence[Argument]) -> str:
    """A call kind as text, for people and as a key.

    >>> describe_kind([Argument("ids", "int64", (2, 7)), Argument("causal", value=True)])
    'ids: int64[2], causal = True'
    """
    return ", ".join(map(str, arguments))
