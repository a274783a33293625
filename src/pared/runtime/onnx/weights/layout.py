"""Operators that only move numbers: where codes, and the step of each, end up on the way to a product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from pared.formats.dtypes import Array

LOWEST: Final = np.finfo(np.float32).min
_OF_TOKENS: Final = 3  # dimensions of a batch of sequences


def constant(value: Any) -> Array | None:
    """The numbers of a value that is known before the graph runs, else None."""
    if value is None or value.const_value is None:
        return None
    found: Array = value.const_value.numpy()
    return found


def _attribute(node: Any, name: str, otherwise: Any = None) -> Any:
    return node.attributes[name].value if name in node.attributes else otherwise


def _axes(numbers: Array) -> tuple[int, ...]:
    return tuple(int(n) for n in numbers.reshape(-1))


def _reshape(node: Any, data: Sequence[Array], rest: Sequence[Array]) -> list[Array]:
    sizes = [int(n) for n in rest[0]]
    if not _attribute(node, "allowzero", 0):
        sizes = [data[0].shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return [data[0].reshape(sizes)]


def _slice(_node: Any, data: Sequence[Array], rest: Sequence[Array]) -> list[Array]:
    starts, ends = rest[0], rest[1]
    axes = rest[2] if len(rest) > 2 else np.arange(len(starts))
    steps = rest[3] if len(rest) > 3 else np.ones(len(starts), np.int64)
    where = [slice(None)] * data[0].ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step <= 0:
            raise NotImplementedError("a slice with a negative step")
        where[int(axis)] = slice(int(start), int(end), int(step))
    return [data[0][tuple(where)]]


def _split(node: Any, data: Sequence[Array], rest: Sequence[Array]) -> list[Array]:
    axis, count = _attribute(node, "axis", 0), len(node.outputs)
    if rest:
        return np.split(data[0], np.cumsum(rest[0])[:-1], axis)
    size = -(-data[0].shape[axis] // count)
    return np.split(data[0], [size * i for i in range(1, count)], axis)


# By operator: its outputs, from the numbers that it moves and its constant inputs.
MOVES: Final[dict[str, Callable[[Any, Sequence[Array], Sequence[Array]], list[Array]]]] = {
    "Concat": lambda node, data, _: [np.concatenate(data, _attribute(node, "axis"))],
    "Identity": lambda _node, data, _rest: [data[0]],
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": lambda _, data, rest: [data[0].squeeze(_axes(rest[0]) if rest else None)],
    "Transpose": lambda node, data, _: [data[0].transpose(_attribute(node, "perm"))],
    "Unsqueeze": lambda _, data, rest: [np.expand_dims(data[0], _axes(rest[0]))],
}


def moved(node: Any) -> int:
    """How many of a node's first inputs it moves; 0 if it does anything else, or not the same in each call."""
    if node.op_type not in MOVES or node.domain not in ("", "ai.onnx"):
        return 0
    count = len(node.inputs) if node.op_type == "Concat" else 1
    return count if all(constant(value) is not None for value in node.inputs[count:]) else 0


def move(node: Any, data: Sequence[Array]) -> list[Array]:
    """The outputs of a node that only moves numbers, as `moved` says.

    Raises:
        NotImplementedError: it moves them in a way that is not implemented here.
    """
    rest = [found for value in node.inputs[len(data) :] if (found := constant(value)) is not None]
    return MOVES[node.op_type](node, data, rest)


def is_misread(rank: int | None) -> bool:
    """Whether OpenVINO (2026.4) misreads a multiplied input of a rank, None if unknown, where a grid follows.

    Of a matrix of varying size it takes the columns' factors into the limits of the grid, and computes something else.
    A maximum with `LOWEST` in between, which changes nothing, keeps it from that.
    """
    return rank is None or rank < _OF_TOKENS


def along(steps: Array) -> tuple[tuple[int, ...], Array]:
    """The dimensions along which the steps of numbers differ, and the steps with size 1 in all other dimensions.

    >>> axes, found = along(np.broadcast_to(np.array([[1.0], [2.0]]), (2, 3)))
    >>> axes, found.tolist()
    ((0,), [[1.0], [2.0]])
    """
    axes = []
    for axis in range(steps.ndim):
        first = steps.take([0], axis)
        if steps.shape[axis] > 1 and steps.strides[axis] and bool((first != steps).any()):
            axes.append(axis)
        else:
            steps = first
    return tuple(axes), steps
