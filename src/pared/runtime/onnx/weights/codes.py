"""Which values of a graph are weights: codes and steps, followed through the operators that only move them."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pared.formats.coded import Grid, Grouped
from pared.formats.dtypes import Array
from pared.formats.views import first_dimension
from pared.model.contents import Contents, Stored
from pared.runtime.onnx.weights.layout import move, moved


@dataclass(eq=False)
class Weight:
    """A value of the graph that only consists of weights' numbers, moved.

    Args:
        value: an `onnx_ir.Value`.
        sources: the tensors that its numbers come from.
        codes: its codes, of the value's shape.
        steps: the step of each code, of the same shape.
        scales: the scale of each code's column, of the same shape; None where columns have none.
    """

    value: Any
    sources: tuple[Stored, ...]
    codes: Array
    steps: Array
    scales: Array | None = None

    @property
    def name(self) -> str:
        """The name of the first source."""
        return self.sources[0].name

    def uses(self, known: Mapping[int, Weight]) -> list[tuple[Any, int]]:
        """The nodes that do more than move it, each with the place of this value among its inputs."""
        return [
            (use.node, use.idx)
            for use in self.value.uses()
            if not any(id(output) in known for output in use.node.outputs)
        ]


def find_weights(graph: Any, contents: Contents) -> dict[int, Weight]:
    """The values that only consist of weights on grids, by the value's `id`, in the graph's order."""
    known = {
        id(value): Weight(value, (stored,), *numbers_of(stored), scales_of(stored))
        for value, stored in sources(graph, [one for one in contents.tensors if by_rows(one)])
    }
    for node in graph:
        count = moved(node)
        parts = [known.get(id(value)) for value in node.inputs[:count]]
        if not parts or any(part is None for part in parts):
            continue
        _add_moved(known, node, [part for part in parts if part is not None])
    return known


def by_rows(stored: Stored) -> bool:
    """Whether a tensor has codes and one step for each row.

    Codes of 4 bits and fewer would take twice their bytes as those of rows do: they are written in groups.
    """
    fmt = stored.coded.format
    if isinstance(fmt, Grouped):
        return fmt.grid.group is None and fmt.grid.zero == "fixed" and not fmt.grid.nested and fmt.grid.bits > 4
    return isinstance(fmt, Grid)


def sources(graph: Any, tensors: Sequence[Stored]) -> Iterator[tuple[Any, Stored]]:
    """The initializers that hold the floats of some tensors, in the graph's order."""
    by_name = {name: one for one in tensors for name in one.names}
    by_numbers: dict[object, Stored] | None = None
    for value in graph.initializers.values():
        stored = by_name.get(value.name)
        if stored is None and _may_be_weight(value):
            if by_numbers is None:  # the exporter renames a weight that a module also keeps in an attribute
                by_numbers = {_key(numpy_of(one.coded.decode())): one for one in tensors}
            stored = by_numbers.get(_key(value.const_value.numpy()))
        if stored is not None:
            yield value, stored


def owner_of(names: Sequence[str], node: Any) -> str:
    """The module whose product a node is: the owner of the weight, of these names, in whose forward it was traced."""
    owners = [name.rpartition(".")[0] for name in names]
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    inside = {str(scope).removeprefix("model").removeprefix(".") for scope in scopes}
    return next((owner for owner in owners if owner in inside), owners[0])


def _add_moved(known: dict[int, Weight], node: Any, parts: list[Weight]) -> None:
    sources = tuple({id(one): one for part in parts for one in part.sources}.values())
    if len({part.codes.dtype for part in parts}) > 1 or len({one.coded.dtype for one in sources}) > 1:
        return
    try:
        scales: Iterable[Array | None]
        codes, steps = (move(node, [getattr(part, of) for part in parts]) for of in ("codes", "steps"))
        if any(part.scales is not None for part in parts):
            scales = move(node, [np.ones_like(part.steps) if part.scales is None else part.scales for part in parts])
        else:
            scales = itertools.repeat(None, len(codes))
    except NotImplementedError:
        return  # the weight is decoded before this node
    for output, one, step, scale in zip(node.outputs, codes, steps, scales, strict=False):  # without end where None
        known[id(output)] = Weight(output, sources, one, step, scale)


def numbers_of(stored: Stored) -> tuple[Array, Array]:
    """The codes, and the step of each, both of the tensor's shape.

    A step of zero, which has no inverse in a runtime, becomes another, and its codes zero.
    """
    coded = stored.coded
    view = coded.view or first_dimension(coded.shape)
    codes, step = coded.parts["codes"].detach(), coded.parts["step"].detach()
    empty = step == 0
    if bool(empty.any()):
        codes = codes.reshape(view.split).masked_fill(view.spread(empty), 0).reshape(coded.shape)
        step = step.masked_fill(empty, float(step[~empty].median()) if not bool(empty.all()) else 1.0)
    spread = view.spread(step).expand(view.split).reshape(coded.shape)
    return codes.numpy(), spread.numpy()


def scales_of(stored: Stored) -> Array | None:
    """The scale of each code's column, of the tensor's shape; None where columns have none."""
    coded = stored.coded
    if "scale" not in coded.parts:
        return None
    view = coded.view or first_dimension(coded.shape)
    scale = coded.parts["scale"].detach()
    spread: Array = view.across.spread(scale).expand(view.split).reshape(coded.shape).numpy()
    return spread


def _may_be_weight(value: Any) -> bool:
    found = value.const_value
    return found is not None and found.size > 1 and found.dtype.is_floating_point() and len(found.shape) > 1


def _key(numbers: Array) -> object:
    return numbers.shape, str(numbers.dtype), numbers.tobytes()


def numpy_of(tensor: Tensor) -> Array:
    """The numbers of a tensor as a NumPy array, bfloat16 included."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype is torch.bfloat16:
        import ml_dtypes

        return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return plain.numpy()
