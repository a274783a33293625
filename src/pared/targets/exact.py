"""A grid with one step for each row as a grid of groups, where that changes no value."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pared.formats.groups.grid import Floats, GroupGrid, Numbers, StepType, representable


def holds(parts: Mapping[str, Numbers], kind: StepType) -> bool:
    """Whether a type has all steps and least values of some parts.

    >>> holds({"step": np.array([2.0**-20, 3 * 2.0**-26], np.float32)}, "float16")
    False
    """
    numbers = [parts[name] for name in ("step", "least") if name in parts]
    return all(np.array_equal(representable(each, kind), each) for each in numbers)


def as_groups(codes: Numbers, step: Floats, grid: GroupGrid, also: StepType | None = None) -> dict[str, Numbers] | None:
    """The parts of a grid of groups that hold the values `step[row] * code` exactly.

    Args:
        codes: whole numbers (rows, columns).
        step: float32 (rows,).
        grid: what to store them on.
        also: a type that has to hold steps and least values as well.

    Returns:
        the parts, see `GroupGrid.shapes`; None if a code is beyond the grid's, or a type lacks one of its steps.

    >>> parts = as_groups(np.array([[7, -8, 1]]), np.array([0.5], np.float32), GroupGrid(4, 2))
    >>> parts["step"].tolist()
    [[0.5, 0.5]]
    >>> as_groups(np.array([[9]]), np.array([0.5], np.float32), GroupGrid(4, 2))
    """
    if codes.size and (codes.min() < grid.low or codes.max() > grid.high):
        return None
    if not np.array_equal(representable(step, grid.step), step):
        return None
    shapes = grid.shapes(*codes.shape)
    parts: dict[str, Numbers] = {"codes": codes.astype(np.int8)}
    parts["step"] = np.broadcast_to(step[:, None], shapes["step"]).astype(np.float32)
    for name in ("multiple", "least multiple"):
        if name in shapes:
            parts[name] = np.ones(shapes[name], np.int8 if grid.signed else np.uint8)
    if grid.zero == "code":
        parts["zero"] = np.zeros(shapes["zero"], np.int8)
    if grid.zero == "least":
        parts["least"] = parts["step"] * np.float32(grid.low)
        least = representable(parts["least"], grid.step)
        if not np.array_equal(least, parts["least"]):  # it is beyond the type's range
            return None
        if not np.array_equal(grid.decode(parts), codes.astype(np.float32) * step[:, None]):
            return None
    return parts if also is None or holds(parts, also) else None
