from __future__ import annotations

import numpy as np
import pytest

from pared.formats.groups.grid import GroupGrid
from pared.targets.exact import as_groups

GRIDS = [
    GroupGrid(8, 32), GroupGrid(8, None, "code"), GroupGrid(4, 32, "least"), GroupGrid(8, 64, "least", "bfloat16"),
    GroupGrid(8, 32, "least", "float32"), GroupGrid(6, 16, nested=4, multiple_bits=8, signed=True),
    GroupGrid(4, 32, "least", nested=2, multiple_bits=6), GroupGrid(8, None, step="bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.label} {grid.zero} {grid.step} {grid.nested}")
def test_a_row_grid_survives(grid: GroupGrid) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(grid.low, grid.high + 1, (5, 80))
    step = (2.0 ** random.integers(-9, -3, 5)).astype(np.float32)
    parts = as_groups(codes, step, grid)
    assert parts is not None
    assert {name: part.shape for name, part in parts.items()} == grid.shapes(5, 80)
    assert np.array_equal(grid.decode(parts), codes * step[:, None])


@pytest.mark.parametrize("code", [8, -9])
def test_codes_that_do_not_fit_are_told(code: int) -> None:
    codes = np.array([[1, code]])
    step = np.ones(1, np.float32)
    assert as_groups(codes, step, GroupGrid(4, 32)) is None
    assert as_groups(codes, step, GroupGrid(5, 32)) is not None


@pytest.mark.parametrize(("step", "kind"), [(1 / 3, "float16"), (1.001, "bfloat16"), (1e-9, "float16")])
def test_steps_that_the_type_does_not_hold_are_told(step: float, kind: str) -> None:
    codes = np.array([[1, 2]])
    assert as_groups(codes, np.array([step], np.float32), GroupGrid(4, 32, step=kind)) is None
    assert as_groups(codes, np.array([step], np.float32), GroupGrid(4, 32, step="float32")) is not None


def test_least_values_beyond_the_type_are_told() -> None:
    codes = np.array([[1, 2]])
    assert as_groups(codes, np.array([1024.0], np.float32), GroupGrid(8, 32, "least")) is None
