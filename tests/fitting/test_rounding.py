"""What each tensor could become: bytes and damage, planned and real."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pared.fitting.calibration.blocks import Blocks
from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding import targets
from pared.fitting.rounding.curves import trace
from pared.fitting.rounding.importance import make_target, table_importance
from pared.fitting.rounding.targets import RoundingTarget, solve
from pared.formats.coded import Coded, Grid
from pared.formats.views import View


def laplacian(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, columns, generator=generator) - 0.5
    return 0.05 * values.sign() * -torch.log1p(-2 * values.abs())


def stats_of(rows: int, columns: int, *, moments: bool = True, spread: float = 0.0) -> TensorStats:
    generator = torch.Generator().manual_seed(3)
    importance = torch.exp(spread * torch.randn(rows, generator=generator, dtype=torch.float64))
    if not moments:
        return TensorStats(importance)
    mix = torch.randn(columns, columns, generator=generator) * 0.3 + 1
    x = torch.randn(64 * columns, columns, generator=generator) @ mix
    both = (x.T @ x)[None], (x[::2].T @ x[::2])[None]
    return TensorStats(importance, *both, layout=Blocks())


def target_of(matrix: Tensor, stats: TensorStats) -> RoundingTarget:
    return make_target(matrix, View(tuple(matrix.shape), (0,)), stats)


def real(target: RoundingTarget, common: int, codes: str) -> tuple[int, float]:
    """The exact bytes, and the damage as the moments see it."""
    found, steps = solve(target, target.steps(common, codes), codes)
    coded = Coded(Grid(codes), tuple(found.shape), torch.float32, {"codes": found, "step": steps}, target.view)
    error = (target.matrix - found * steps[:, None]).double()
    return coded.nbytes, float((target.importance * error.square().mean(1)).sum())


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_planned_bytes_are_real_bytes(moments: bool, spread: float) -> None:
    stats = stats_of(400, 96, moments=moments, spread=spread)
    target = target_of(laplacian(400, 96), stats)
    curve = trace(target, stats)
    for bits in (7.0, 5.0, 3.5, 2.5, 1.5):
        option = int(np.abs(8 * curve.nbytes / target.matrix.numel() - bits).argmin())
        nbytes, _ = real(target, int(curve.common[option]), curve.codes[option])
        assert nbytes == pytest.approx(curve.nbytes[option], rel=0.01), bits


def test_planned_damage_of_plain_rounding_is_real_damage() -> None:
    stats = stats_of(300, 64, moments=False, spread=0.7)
    target = target_of(laplacian(300, 64), stats)
    curve = trace(target, stats)
    for option in range(0, len(curve.common), 12):
        _, damage = real(target, int(curve.common[option]), curve.codes[option])
        assert damage == pytest.approx(curve.damage[option], rel=0.1)


def test_planned_damage_of_feedback_is_judged_by_inputs_it_has_not_seen() -> None:
    stats = stats_of(256, 48)
    target = target_of(laplacian(256, 48), stats)
    assert stats.moments is not None
    curve = trace(target, stats)
    option = int(np.abs(8 * curve.nbytes / target.matrix.numel() - 4).argmin())
    codes, steps = solve(target, target.steps(int(curve.common[option]), curve.codes[option]), curve.codes[option])
    error = target.matrix - codes * steps[:, None]
    moments = stats.moments[0]
    damage = float(((error @ moments) * error).sum() / moments.diagonal().sum())
    assert damage == pytest.approx(curve.damage[option], rel=0.25)
    plain = trace(target_of(target.matrix, TensorStats(stats.rows)), TensorStats(stats.rows))
    same = int(np.abs(plain.nbytes - curve.nbytes[option]).argmin())
    assert curve.damage[option] < 0.5 * plain.damage[same], "feedback is worth more than half"


def test_finer_steps_cost_a_bit_an_octave_and_do_a_quarter() -> None:
    stats = stats_of(64, 64, moments=False)
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    curve = trace(target_of(matrix, stats), stats)
    wide = [i for i, codes in enumerate(curve.codes) if codes == "int16"]
    at = {int(curve.common[i]): i for i in wide}
    fine = min(at) + 16
    one, other = at[fine], at[fine + 8]
    assert (curve.nbytes[one] - curve.nbytes[other]) * 8 / matrix.numel() == pytest.approx(1.0, abs=0.02)
    assert curve.damage[other] / curve.damage[one] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("moments", [False, True])
def test_how_many_rows_are_rounded_together_changes_nothing(
    moments: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = stats_of(48, 16, moments=moments)
    if groups > 1 and stats.moments is not None and stats.unseen is not None:
        every, unseen = (one.repeat(groups, 1, 1) for one in (stats.moments, stats.unseen))
        stats = replace(stats, moments=every, unseen=unseen, layout=Blocks(groups, 1))
    whole, results = target_of(laplacian(48, 16), stats), []
    for most in (1 << 24, 16 * 24, 16 * 5, 1):
        monkeypatch.setattr(targets, "WEIGHTS_AT_ONCE", most)
        target = replace(whole)
        parts = list(targets.at_once(target))
        assert torch.equal(torch.cat([one.reshape(-1) for one in parts]), torch.arange(48))
        assert max(one.numel() for one in parts) <= max(most // 16, 1)
        results.append((*solve(target, target.steps(-44, "int8"), "int8"), target.mean_squares))
    for codes, steps, squares in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert torch.equal(steps, results[0][1])
        torch.testing.assert_close(squares, whole.matrix.square().mean(1))


@pytest.mark.parametrize("moments", [False, True])
def test_tensors_of_zeros(moments: bool) -> None:
    stats = stats_of(4, 8, moments=moments)
    curve = trace(target_of(torch.zeros(4, 8), stats), stats)
    assert curve.nbytes.tolist() == [0.0]
    matrix = laplacian(4, 8)
    matrix[2] = 0
    target = target_of(matrix, stats)
    codes, steps = solve(target, target.steps(-40, "int8"), "int8")
    assert float(steps[2]) == 0
    assert not codes[2].any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (100, 1), (3, 5)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    stats = TensorStats(torch.ones(shape[0], dtype=torch.float64))
    curve = trace(target_of(laplacian(*shape) + 0.1, stats), stats)
    assert np.isfinite(curve.nbytes).all()
    assert np.isfinite(curve.damage).all()


@pytest.mark.parametrize("tied", [False, True])
@given(uses=st.lists(st.integers(0, 40), min_size=2, max_size=60).filter(any), seed=st.integers(0, 9))
@settings(deadline=None)
@pytest.mark.slow
def test_a_row_never_seen_is_never_coarser_than_an_ordinary_one(uses: list[int], seed: int, tied: bool) -> None:
    counts = torch.tensor(uses, dtype=torch.float64)
    noise = torch.rand(len(uses), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    importance = table_importance(counts * noise, counts)
    assert bool((importance > 0).all())
    seen = importance[counts > 0]
    for unseen in importance[counts == 0]:
        assert float(unseen) >= float(seen.median()) - 1e-12
    matrix = laplacian(len(uses), 16)
    # As a head, every row has some effect, and the inputs have moments.
    rows = counts * noise + 0.01 if tied else counts * noise
    target = target_of(matrix, TensorStats(rows, torch.eye(16)[None] if tied else None, uses=counts))
    assert torch.equal(target.importance, table_importance(rows, counts))
    steps = target.steps(-60, "int16")
    ordinary = steps[counts > 0].sort().values[int((counts > 0).sum()) // 2]
    assert bool((steps[counts == 0] <= ordinary).all())


@given(st.integers(-100, 0), st.floats(0, 2))
@settings(deadline=None, max_examples=25)
def test_steps_lie_on_the_table_and_follow_importance(common: int, spread: float) -> None:
    stats = stats_of(40, 16, moments=False, spread=spread)
    target = target_of(laplacian(40, 16), stats)
    steps = target.steps(common, "int16").double()
    index = 8 * steps.log2()
    assert torch.allclose(index, index.round(), atol=1e-4)
    free = steps > 1.01 * target.absmax.double() / 32000
    wished = (common + target.exponents[free]).double()
    assert torch.allclose(index[free], wished, atol=1e-4)
    damages = (target.importance * torch.exp2(target.exponents / 4.0))[free]
    if len(damages) > 1 and bool(target.exponents.any()):
        assert float(damages.max() / damages.min()) < 2 ** (2 * 8 / 8) * 1.01, "equal up to the exponents' resolution"
    assert math.isfinite(float(steps.sum()))


@pytest.mark.parametrize("moments", [False, True])
def test_a_row_without_a_gradient_counts_like_an_ordinary_one(moments: bool) -> None:
    """Experts, rows of a table that is indexed: what calibration did not reach is not wiped out."""
    rows = torch.tensor([0.0, 1.0, 2.0, 4.0, 0.0], dtype=torch.float64)
    stats = TensorStats(rows, torch.eye(64)[None] if moments else None)
    target = make_target(torch.randn(5, 64), View((5, 64), (0,)), stats)
    assert target.importance.tolist() == [2.0, 1.0, 2.0, 4.0, 2.0]
