"""Rounding with error feedback: against a slow dense reference, and what it buys."""

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pared.fitting.calibration.blocks import WIDEST_BLOCK, Blocks
from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding.feedback import DAMPING, RowSteps, factor, feedback
from pared.fitting.rounding.importance import DAMPINGS, make_target
from pared.fitting.rounding.targets import solve
from pared.formats.views import View


def correlated(blocks: int, columns: int, samples: int = 400, seed: int = 0) -> Tensor:
    """Second moments of inputs that follow each other closely and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(blocks, columns, columns, generator=generator)
    x = torch.randn(blocks, samples, columns, generator=generator) @ (mix * 0.3 + 1)
    x = x * torch.linspace(0.5, 2.0, columns)
    return x.transpose(1, 2) @ x / samples


Rounded = Callable[[int, int, int, float], tuple[float, float]]


def reference(weights: Tensor, moments: Tensor, rounded: Rounded, damping: float) -> Tensor:
    """One column at a time, each error spread by the inverse of what is left of the moments (OBQ, GPTQ's origin).

    Args:
        weights: (blocks, rows, columns).
        moments: (blocks, columns, columns).
        rounded: the code and the value for a block, a row, a column and a number.
        damping: share of the mean second moment that is added to each.
    """
    codes = torch.zeros_like(weights)
    for b in range(len(weights)):
        m = moments[b].double().numpy().copy()
        mean = np.diag(m).mean()
        m += damping * (mean if mean > 0 else 1.0) * np.eye(len(m))
        order = np.argsort(-np.diag(m), kind="stable").tolist()
        w = weights[b].double().numpy().copy()
        for place, j in enumerate(order):
            later = order[place + 1 :]
            for r in range(len(w)):
                codes[b, r, j], value = rounded(b, r, j, w[r, j])
                error = w[r, j] - value
                if later:
                    # The later weights that make up for the error best: least squares under the moments.
                    w[r, later] += error * np.linalg.solve(m[np.ix_(later, later)], m[np.ix_(later, [j])])[:, 0]
    return codes


def by_rows(steps: Tensor, limit: int) -> Rounded:
    def rounded(b: int, r: int, _: int, number: float) -> tuple[float, float]:
        step = float(steps[b, r])
        code = float(np.clip(np.round(number / step), -limit, limit)) if step > 0 else 0.0
        return code, code * step

    return rounded


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("columns", [1, 2, 9, 40])
def test_it_is_the_dense_reference(blocks: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    weights = torch.randn(blocks, 5, columns, generator=generator)
    moments = correlated(blocks, columns)
    steps = torch.rand(blocks, 5, generator=generator) * 0.3 + 0.05
    expected = reference(weights, moments, by_rows(steps, 127), DAMPING)
    assert torch.equal(feedback(weights, factor(moments), RowSteps(steps, 127)), expected)


@given(st.integers(1, 70), st.integers(1, 50), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_block_size_changes_nothing(block: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 4, columns, generator=generator, dtype=torch.float32)
    factored = factor(correlated(2, columns, seed=seed))
    steps = torch.full((2, 4), 0.2)
    one, other = (feedback(weights, factored, RowSteps(steps, 127), size) for size in (1, block))
    assert float((one - other).abs().max()) <= 1  # a tie may fall either way
    assert float((one != other).double().mean()) < 0.02


def test_the_output_is_nearer_and_the_weights_are_farther() -> None:
    weights = torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(0))
    moments = correlated(1, 96)
    steps = torch.full((1, 64), 0.4)
    nearest = weights - (weights / 0.4).round() * 0.4
    ours = weights - feedback(weights, factor(moments), RowSteps(steps, 127)) * 0.4

    def output_error(error: Tensor) -> float:
        return float(((error @ moments) * error).sum())

    assert output_error(ours) < 0.5 * output_error(nearest)
    assert float(ours.square().sum()) > 1.2 * float(nearest.square().sum())
    share = float(factor(moments).remaining.sum() / moments.diagonal(dim1=1, dim2=2).sum())
    assert output_error(ours) < 1.3 * share * output_error(nearest)


def test_columns_are_rounded_by_falling_second_moment() -> None:
    moments = torch.diag(torch.tensor([1.0, 9.0, 4.0]))[None]
    assert factor(moments).order.tolist() == [[1, 2, 0]]


def test_moments_of_nothing_and_steps_of_zero() -> None:
    weights = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    silent = factor(torch.zeros(1, 8, 8))
    steps = torch.tensor([[0.5, 0.0, 0.5]])
    codes = feedback(weights, silent, RowSteps(steps, 127))
    assert torch.equal(codes[0, 0], (weights[0, 0] / 0.5).round())
    assert torch.equal(codes[0, 1], torch.zeros(8))


def test_singular_moments_are_damped() -> None:
    one = torch.ones(1, 6, 6)  # all inputs are the same
    factored = factor(one)
    assert torch.isfinite(factored.spill).all()
    codes = feedback(torch.full((1, 1, 6), 0.4), factored, RowSteps(torch.tensor([[1.0]]), 127))
    assert float(codes.sum()) == 2  # 6 * 0.4 is 2.4: the sum is right, where nearest gives 0


def solved(matrix: Tensor, moments: Tensor, layout: Blocks, step: float) -> tuple[Tensor, Tensor]:
    stats = TensorStats(torch.ones(len(matrix), dtype=torch.float64), moments, layout=layout)
    target = make_target(matrix, View(tuple(matrix.shape), (0,)), stats)
    common = round(8 * np.log2(step))
    return solve(target, target.steps(common, "int8"), "int8")


def test_monsters_do_not_spoil_their_row() -> None:
    matrix = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    matrix[3, 5] = 175 * 0.05
    moments = correlated(1, 64)
    codes, steps = solved(matrix, moments, Blocks(), 0.01)
    assert int(codes.abs().max()) < 127
    error = matrix - codes * steps[:, None]
    per_row = ((error @ moments[0]) * error).sum(1) / ((matrix @ moments[0]) * matrix).sum(1)
    assert float(per_row.max()) < 0.01
    assert float(steps[3]) >= 175 * 0.05 / 127


def test_rows_that_leave_the_range_are_solved_again() -> None:
    matrix = torch.full((2, 40), 1.0)
    moments = torch.ones(1, 40, 40) * 3
    codes, steps = solved(matrix, moments, Blocks(), 1e-4)
    assert int(codes.abs().max()) < 127
    assert torch.allclose(codes * steps[:, None], matrix, atol=0.1)


def rounded(matrix: Tensor, moments: Tensor, steps: Tensor, damping: float) -> Tensor:
    layout = Blocks(groups=len(moments))
    blocks = layout.row_blocks(steps).contiguous()
    codes = feedback(layout.blocks(matrix), factor(moments, damping), RowSteps(blocks, 127))
    return layout.matrix(codes, matrix.shape[1]).to(torch.int8)


def test_groups_in_one_batch_are_groups_one_by_one() -> None:
    matrix = torch.randn(24, 9, generator=torch.Generator().manual_seed(0))
    moments = correlated(8, 9)
    codes, steps = solved(matrix, moments, Blocks(groups=8), 0.25)
    damping = next(d for d in DAMPINGS if torch.equal(codes, rounded(matrix, moments, steps, d)))
    for group in range(8):
        rows = slice(3 * group, 3 * group + 3)
        factored = factor(moments[group : group + 1], damping)
        alone = feedback(matrix[None, rows], factored, RowSteps(steps[None, rows], 127))[0]
        assert torch.equal(codes[rows].float(), alone)


def test_wide_matrices_are_cut_into_parts() -> None:
    layout = Blocks(1, 2)
    matrix = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layout.matrix(layout.blocks(matrix), matrix.shape[1]), matrix)
    moments = correlated(2, 6)
    codes, steps = solved(matrix, moments, layout, 0.25)
    for part in range(2):
        columns = slice(6 * part, 6 * part + 6)
        factored = factor(moments[part : part + 1])
        expected = feedback(matrix[None, :, columns], factored, RowSteps(steps[None], 127))[0]
        assert torch.equal(codes[:, columns].float(), expected)
    assert WIDEST_BLOCK**2 * 4 <= 64 << 20, "a block of moments is at most 64 MiB"


def test_blocks_are_factored_alike_however_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = correlated(5, 12)
    together = factor(moments)
    monkeypatch.setattr("pared.fitting.rounding.feedback._MAX_ENTRIES", 300)  # two blocks
    apart = factor(moments)
    for field in fields(together):
        assert torch.equal(getattr(together, field.name), getattr(apart, field.name))
