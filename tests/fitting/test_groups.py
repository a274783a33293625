"""Feedback on grids with a step for each group of columns: against a slow dense reference that tries every code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pared.fitting.calibration.blocks import Blocks
from pared.fitting.rounding.feedback import DAMPING, factor, feedback
from pared.fitting.rounding.groups.columns import group_columns
from pared.formats.groups.grid import GroupGrid
from pared.formats.groups.search import fitted, nearest
from tests.fitting.test_feedback import Rounded, correlated, reference

GRIDS = [
    GroupGrid(4, 4),
    GroupGrid(8, 5),
    GroupGrid(3, None),
    GroupGrid(4, 4, "code"),
    GroupGrid(4, 4, "least"),
    GroupGrid(2, None, "least", "float32"),
    GroupGrid(6, 4, "fixed", nested=2, multiple_bits=8, signed=True),
    GroupGrid(4, 4, "least", nested=2, multiple_bits=6),
]


def some_parts(grid: GroupGrid, rows: int, columns: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Steps of any size and sign that the grid allows, some of them 0."""
    draw = np.random.default_rng(seed)
    shapes = grid.shapes(rows, columns)
    low, high = grid.multiples
    scale = 1.0 / 20 if grid.nested else 1.0
    parts: dict[str, NDArray[Any]] = {
        "step": (draw.uniform(0.1, 0.5, shapes["step"]) * scale).astype(np.float32)
        * (draw.random(shapes["step"]) > 0.1)
    }
    if grid.zero == "fixed":
        parts["step"] *= draw.choice([-1, 1], shapes["step"]).astype(np.float32)
    for name in ("multiple", "least multiple"):
        if name in shapes:
            parts[name] = draw.integers(max(low, -20), min(high, 20), shapes[name]).astype(np.int8)
    if grid.zero == "code":
        parts["zero"] = draw.integers(grid.low, grid.high, shapes["zero"]).astype(np.int8)
    if grid.zero == "least":
        parts["least"] = (-draw.uniform(0.2, 1.5, shapes["least"]) * scale).astype(np.float32)
    return parts


def by_trying(grid: GroupGrid, parts: dict[str, NDArray[Any]], layout: Blocks, shape: tuple[int, int]) -> Rounded:
    """Of all codes the one whose value is nearest; where all values are the same, that which the grid prescribes."""
    codes = range(grid.low, grid.high + 1)
    values = torch.stack(
        [torch.from_numpy(grid.decode({**parts, "codes": np.full(shape, code, np.int8)})) for code in codes]
    ).double()
    blocks = [layout.blocks(of_code) for of_code in values]

    def rounded(b: int, r: int, j: int, number: float) -> tuple[float, float]:
        own = [float(block[b, r, j]) for block in blocks]
        if len(set(own)) == 1:
            return (grid.low if grid.zero == "least" else 0), own[0]
        best = min(range(len(own)), key=lambda i: abs(own[i] - number))
        return codes[best], own[best]

    return rounded


@pytest.mark.parametrize("layout", [Blocks(), Blocks(2, 1), Blocks(1, 3)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_is_the_dense_reference(grid: GroupGrid, layout: Blocks) -> None:
    shape = (6, 15)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    parts = some_parts(grid, *shape)
    moments = correlated(layout.groups * layout.column_blocks, shape[1] // layout.column_blocks)
    expected = reference(layout.blocks(matrix), moments, by_trying(grid, parts, layout, shape), DAMPING)
    found = feedback(layout.blocks(matrix), factor(moments), group_columns(grid, parts, layout, shape[1]))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_block_size_changes_nothing(grid: GroupGrid, block: int) -> None:
    matrix = torch.randn((5, 40), generator=torch.Generator().manual_seed(2))
    columns = group_columns(grid, some_parts(grid, 5, 40), Blocks(), 40)
    factored = factor(correlated(1, 40))
    one, other = (feedback(matrix[None], factored, columns, size) for size in (16, block))
    assert float((one - other).abs().max()) <= 1  # a tie may fall either way
    assert float((one != other).double().mean()) < 0.02


def test_columns_that_fill_the_last_block_up_belong_to_the_last_group() -> None:
    grid, layout = GroupGrid(4, 4), Blocks(1, 2)
    matrix = torch.randn((3, 9), generator=torch.Generator().manual_seed(3))
    parts = some_parts(grid, 3, 9)
    codes = feedback(layout.blocks(matrix), factor(correlated(2, 5)), group_columns(grid, parts, layout, 9))
    assert layout.matrix(codes, 9).shape == (3, 9)


def output_error(error: Tensor, moments: Tensor) -> float:
    return float(((error @ moments) * error).sum())


@pytest.mark.parametrize("grid", [replace(grid, group=20) for grid in GRIDS if grid.bits > 2], ids=str)
def test_the_output_is_nearer(grid: GroupGrid) -> None:
    matrix = torch.randn((32, 60), generator=torch.Generator().manual_seed(4))
    moments = correlated(1, 60)
    parts = fitted(matrix.numpy(), grid)
    plain = torch.from_numpy(grid.decode({**parts, "codes": nearest(matrix.numpy(), grid, parts)}))
    columns = group_columns(grid, parts, Blocks(), 60)
    codes = feedback(matrix[None], factor(moments), columns)[0].to(torch.int8)
    ours = torch.from_numpy(grid.decode({**parts, "codes": codes.numpy()}))
    assert output_error(matrix - ours, moments[0]) < 0.8 * output_error(matrix - plain, moments[0])
