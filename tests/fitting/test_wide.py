"""Weights so wide that only some blocks of their columns are rounded for a curve."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pared.fitting.calibration.blocks import Blocks
from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding import curves
from pared.fitting.rounding.curves import sample_blocks, trace
from pared.fitting.rounding.feedback import factor
from pared.fitting.rounding.importance import make_target
from pared.fitting.rounding.targets import RoundingTarget, narrowed, of_blocks, solve
from pared.formats.views import View
from tests.fitting.test_feedback import correlated

BLOCKS, WIDTH = 12, 24


def wide(groups: int = 1, rows: int = 96, columns: int = BLOCKS * WIDTH) -> tuple[Tensor, TensorStats]:
    """A matrix, and moments that differ from block to block, with the part from the other half of the calls."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    sizes = torch.logspace(0, 1.5, groups * BLOCKS)[:, None, None]
    unseen = correlated(groups * BLOCKS, WIDTH, seed=1) * sizes
    moments = correlated(groups * BLOCKS, WIDTH, seed=2) * sizes + unseen
    return matrix, TensorStats(torch.ones(rows).double(), moments, unseen, Blocks(groups, BLOCKS))


def target_of(matrix: Tensor, stats: TensorStats, *, whole: bool = False) -> RoundingTarget:
    return make_target(matrix, View(tuple(matrix.shape), (0,)), stats, whole=whole)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks are enough."""
    monkeypatch.setattr(curves, "_MIN_COLUMNS", 4 * WIDTH)
    monkeypatch.setattr(curves, "_SAMPLED_WEIGHTS", 1)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("columns", [BLOCKS * WIDTH, BLOCKS * WIDTH - 5])
def test_blocks_of_columns_are_those_of_the_whole(groups: int, columns: int) -> None:
    matrix, stats = wide(groups, columns=columns)
    target = replace(target_of(matrix, stats), sampled=None)
    blocks = torch.tensor([1, 4, 10])
    part = narrowed(target, blocks)
    assert stats.moments is not None
    whole = target.layout.blocks(matrix).unflatten(0, (groups, BLOCKS))
    assert torch.equal(part.layout.blocks(part.matrix), whole[:, blocks].flatten(0, 1))
    found = of_blocks(target.layout, stats.moments, blocks)
    assert torch.equal(found, stats.moments.unflatten(0, (groups, BLOCKS))[:, blocks].flatten(0, 1))
    assert narrowed(target, None).matrix is matrix


def test_blocks_are_spread_over_energies_and_full(few: None) -> None:
    matrix, stats = wide(columns=BLOCKS * WIDTH - 5)
    found = sample_blocks(target_of(matrix, stats), stats.judge)
    assert found is not None
    assert found.tolist() == [1, 4, 6, 9], "energies grow with the block, and the last one is not full"
    alike = sample_blocks(target_of(matrix, stats), None)
    assert alike is not None
    assert len(alike.unique()) == 4


def test_narrow_weights_are_rounded_as_a_whole() -> None:
    matrix, stats = wide()
    assert target_of(matrix, stats).sampled is None


def test_a_few_blocks_tell_what_all_would(few: None) -> None:
    matrix, stats = wide()
    some, every = target_of(matrix, stats), target_of(matrix, stats, whole=True)
    assert some.sampled is not None
    assert every.sampled is None
    idle = target_of(matrix, replace(stats, moments=torch.eye(WIDTH).repeat(BLOCKS, 1, 1), unseen=None))
    assert idle.factored is None, "inputs are independent"
    assert idle.sampled is not None
    one, other = trace(some, stats), trace(every, stats)
    assert one.common.tolist() == other.common.tolist()
    bits = 8 * other.nbytes / matrix.numel()
    middle = (bits > 1.5) & (bits < 8)
    assert torch.allclose(torch.tensor(one.nbytes[middle]), torch.tensor(other.nbytes[middle]), rtol=0.1)
    assert torch.allclose(torch.tensor(one.damage[middle]), torch.tensor(other.damage[middle]), rtol=0.1)


def test_all_columns_are_rounded_with_feedback_all_the_same(few: None) -> None:
    matrix, stats = wide()
    target = target_of(matrix, stats)
    codes, steps = solve(target, target.steps(-16, "int8"), "int8")
    plain = (matrix / steps[:, None]).round()
    changed = (codes != plain).unflatten(1, (BLOCKS, WIDTH)).double().mean((0, 2))
    assert float(changed.min()) > 0.05


def test_factors_are_kept_in_half_the_memory() -> None:
    exact = factor(correlated(2, 40))
    kept = exact.halved()
    assert kept.spill.dtype == torch.float16
    assert torch.allclose(kept.spill.float(), exact.spill, rtol=1e-3, atol=1e-6)
    extreme = torch.full((1, 64, 64), 1e6)  # all inputs are the same, and hardly damped
    assert torch.isfinite(factor(extreme, 0.015).halved().spill).all()
