"""Call kinds: the names, types and ranks of a call's tensors, and the values of its other arguments.

A graph is made for one kind of call and serves no other. An argument that holds tensors, such as a cache, stands for
itself and, under names such as "cache.own.0.keys", for each of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from torch import Tensor, nn

from pared.files.checks import Place
from pared.runtime.graphs.containers import Container, container_of, layout_from, leaves_of

_CONSTANTS: Final = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Argument:
    """One argument of a call, or a tensor in it.

    Args:
        name: the name of the parameter of `forward`, and of what it holds, after a dot.
        dtype: the type of a tensor, such as "float32"; empty for a constant.
        shape: the shape of a tensor.
        value: the value of a constant.
        holds: the `Layout` of an argument that holds tensors, as text; empty for all others.
    """

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    value: bool | float | str | None = None
    holds: str = ""

    @classmethod
    def from_json(cls, data: object, at: Place) -> Argument:
        """The inverse of `dataclasses.asdict`. Raises CorruptError for anything else: a file may hold anything."""
        names = [one.name for one in fields(cls)]
        known = at.fields(data, "an argument", names[:-1], names[-1:])
        dtype, value = at.text(known["dtype"], "its type"), known["value"]
        if dtype and not isinstance(getattr(torch, dtype, None), torch.dtype):
            at.fail(f"no tensor can be of type {dtype[:80]!r}")
        if isinstance(value, str):
            at.text(value, "its value")
        elif value is not None and type(value) is not bool:
            value = at.number(value, "its value") if type(value) is float else at.integer(value, "its value")
        holds = at.text(known.get("holds", ""), "what it holds")
        if holds and (dtype or layout_from(holds) is None):
            at.fail(f"no argument of a call holds {holds[:80]!r}")
        return cls(at.text(known["name"], "its name"), dtype, at.shape(known["shape"], "shape"), value, holds)

    @property
    def nbytes(self) -> int:
        """The bytes of a tensor like that of the call; 0 for a constant."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize if self.dtype else 0

    @property
    def kind(self) -> tuple[object, ...]:
        """The argument's share of `kind_of`."""
        if self.dtype:
            return self.name, getattr(torch, self.dtype), len(self.shape)
        if self.holds:
            return self.name, Container, self.holds
        return self.name, type(self.value), self.value

    def __str__(self) -> str:
        """The argument's share of `describe_kind`.

        >>> print(Argument("ids", "int64", (2, 7)), Argument("causal", value=True), sep=", ")
        ids: int64[2], causal = True
        """
        if self.dtype:
            return f"{self.name}: {self.dtype}[{len(self.shape)}]"
        return f"{self.name} = {self.holds or repr(self.value)}"

    @property
    def size(self) -> str:
        """The size of an argument, for people; of what holds many tensors that of the first, and empty for the others.

        >>> Argument("ids", "int64", (2, 7)).size, Argument("cache.own.0.keys", "float32", (1, 2, 9, 4)).size
        ('ids 2 x 7', 'cache.own.0.keys 1 x 2 x 9 x 4')
        """
        is_first = "." not in self.name or self.name.endswith((".own.0.keys", ".cross.0.keys", ".last_hidden_state"))
        return f"{self.name} {' x '.join(map(str, self.shape))}" if self.dtype and is_first else ""

    def example(self) -> object:
        """An example: the constant, or a tensor of zeros; None for what holds tensors."""
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
    for name, value in list(bound.items()):
        if type(value) is not Tensor and type(value) not in _CONSTANTS:
            container = container_of(value)
            if container is None:
                return None
            bound[name] = container
            bound |= {f"{name}.{inner}": tensor for inner, tensor in container.tensors.items()}
    for value in bound.values():
        if type(value) is Tensor:
            if value.layout is not torch.strided or not value.is_cpu or value.is_quantized:
                return None
        elif isinstance(value, Tensor):
            return None
    return {name: bound[name] for name in sorted(bound)}


def caches_of(bound: Bound) -> dict[str, Container]:
    """The arguments to which a call writes what the next one needs, by name."""
    return {name: one for name, one in bound.items() if type(one) is Container and one.is_cache}


def unknown_output(output: object) -> str:
    """Why no graph can give the output of a call, in words; empty if nothing in it says so.

    >>> unknown_output({"logits": torch.zeros(2), "cache": iter(())})
    'its output holds: tuple_iterator'
    """
    kinds = {type(leaf).__name__ for leaf in leaves_of(output) if not isinstance(leaf, (Tensor, *_CONSTANTS))}
    return f"its output holds: {min(kinds)}" if kinds else ""


def kind_of(bound: Bound) -> tuple[object, ...]:
    """The kind of a call: calls of one kind may be served by the same graph."""
    return tuple(map(_kind_of, bound, bound.values()))


def _kind_of(name: str, value: Any) -> tuple[object, ...]:
    if type(value) is Tensor:
        return name, value.dtype, value.dim()
    return name, type(value), str(value.layout) if type(value) is Container else value


def tensors_of(kind: tuple[object, ...]) -> tuple[object, ...]:
    """The part of a call kind that concerns tensors.

    >>> tensors_of(kind_of({"causal": True, "x": torch.zeros(2, 3)}))
    (('x', torch.float32, 2),)
    """
    return tuple(part for part in kind if isinstance(part, tuple) and isinstance(part[1], torch.dtype))


def arguments_of(bound: Bound) -> tuple[Argument, ...]:
    """A call as plain data: the tensors' types and shapes, and the constants."""
    return tuple(map(_argument, bound, bound.values()))


def _argument(name: str, value: Any) -> Argument:
    if type(value) is Tensor:
        return Argument(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
    return Argument(name, holds=str(value.layout)) if type(value) is Container else Argument(name, value=value)


def describe_kind(arguments: Sequence[Argument]) -> str:
    """A call kind as text, for people and as a key.

    >>> describe_kind([Argument("ids", "int64", (2, 7)), Argument("causal", value=True)])
    'ids: int64[2], causal = True'
    """
    return ", ".join(map(str, arguments))
