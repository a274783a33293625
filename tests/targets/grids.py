"""Random numbers on grids of groups."""

from __future__ import annotations

import numpy as np

from pared.formats.groups.grid import GroupGrid, Numbers, representable


def random_parts(grid: GroupGrid, rows: int, columns: int, seed: int = 0) -> dict[str, Numbers]:
    """Parts of a grid whose values have a deviation of about 0.1."""
    rng = np.random.default_rng(seed)
    least, most = grid.multiples
    size = 0.2 / (1 << grid.bits) / (most / 2 if grid.nested else 1)
    parts: dict[str, Numbers] = {}
    for name, shape in grid.shapes(rows, columns).items():
        if name == "codes":
            parts[name] = rng.integers(grid.low, grid.high, shape, np.int8, endpoint=True)
        elif name == "zero":
            parts[name] = rng.integers(grid.low // 2, grid.high // 2, shape, np.int8, endpoint=True)
        elif name.endswith("multiple"):
            kind = np.int8 if grid.signed else np.uint8
            parts[name] = rng.integers(least, most, shape, kind, endpoint=True)
        else:
            values = (rng.random(shape) + 0.5).astype(np.float32) * np.float32(size)
            if name == "least":
                values = -values * np.float32(1 << (grid.bits - 1))
            parts[name] = representable(values, grid.step)
    return parts
