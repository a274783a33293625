"""A grid with one step for each row as a grid of groups, where that changes no value."""

from __future__ import annotations

import numpy as np

from pared.formats.groups.grid import Floats, GroupGrid, Numbers, representable


def as_groups(codes: Numbers, step: Floats, grid: GroupGrid) -> dict[str, Numbers] | None:
    """The parts of a grid of groups that hold the values `step[row] * code` exactly.

    Args:
        codes: whole numbers (rows, columns).
        step: float32 (rows,).
        grid: what to store them on.

    Returns:
        the parts, see `GroupGrid.shapes`; None if a code is beyond the grid's, or its type of steps does not hold one.

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
    return parts
