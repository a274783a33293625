"""Grids with groups, as runtimes have them, and numbers for them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pared.formats.groups.grid import GroupGrid

GRIDS = {
    "Q8_0": GroupGrid(8, 32),
    "Q4_0": GroupGrid(4, 32),
    "Q4_1": GroupGrid(4, 32, "least"),
    "Q6_K": GroupGrid(6, 16, nested=16, multiple_bits=8, signed=True),
    "Q4_K": GroupGrid(4, 32, "least", nested=8, multiple_bits=6),
    "Q3_K": GroupGrid(3, 16, nested=16, multiple_bits=6, signed=True),
    "Q2_K": GroupGrid(2, 16, "least", nested=16, multiple_bits=4),
    "int4 g128, zero": GroupGrid(4, 128, "code", step="bfloat16"),
    "int4 g5": GroupGrid(4, 5, "code"),
    "int8 rows": GroupGrid(8, None, step="float32"),
}


def random_parts(grid: GroupGrid, rows: int, columns: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Any parts that the grid may have."""
    generator = np.random.default_rng(seed)
    parts: dict[str, NDArray[Any]] = {}
    for name, shape in grid.shapes(rows, columns).items():
        if name in ("step", "least"):
            parts[name] = generator.normal(size=shape).astype(np.float16).astype(np.float32)
            if grid.step == "bfloat16":
                parts[name] = (parts[name].view(np.uint32) & 0xFFFF0000).view(np.float32)
        elif name in ("codes", "zero"):
            parts[name] = generator.integers(grid.low, grid.high + 1, shape).astype(np.int8)
        else:
            low, high = grid.multiples
            parts[name] = generator.integers(low, high + 1, shape).astype(np.int8 if grid.signed else np.uint8)
    return parts
