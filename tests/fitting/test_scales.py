"""Scales of columns: what they are taken from, where they are taken, and that everything else follows them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import pared
from pared.fitting.calibration.blocks import Blocks
from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding.feedback import factor
from pared.fitting.rounding.importance import plain_target
from pared.fitting.rounding.scales import choice
from pared.fitting.rounding.scales.choice import chosen_scales, column_scales, nbytes_of, scaled_stats
from pared.fitting.rounding.targets import solve
from pared.fitting.search.free.on_grids import may_scale
from pared.formats.coded import Grid, log_step
from pared.formats.views import View
from pared.model.tensors import find_tensors
from pared.runtime.record import contents_of
from tests.fitting.test_feedback import correlated

VIEW = View((48, 64), (0,))


def uneven(columns: int = 64) -> Tensor:
    """How far the columns of an input reach."""
    return torch.exp2(torch.linspace(-3, 3, columns))


def known(moments: Tensor, unseen: Tensor | None = None) -> TensorStats:
    return TensorStats(torch.linspace(0.5, 2, 48, dtype=torch.float64), moments, unseen)


def weight() -> Tensor:
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(0))


def test_scales_are_powers_of_the_mean_squares_on_a_scale_of_quarters() -> None:
    moments = torch.diag(uneven().square())[None]
    for power, least in ((-0.25, 2**-1.5), (-0.5, 0.25)):
        scale = column_scales(known(moments), power, 64)
        assert scale is not None
        quarters = 4 * scale.double().log2()
        assert torch.allclose(quarters, quarters.round(), atol=1e-5)
        assert torch.equal(scale, log_step(scale)), "in a file each is a whole number"
        assert float(scale[-1]) == pytest.approx(least, rel=0.1)
        assert float(scale.max()) <= 4
        assert bool((scale[1:] <= scale[:-1]).all()), "what reaches further has finer steps"
        assert 0 < nbytes_of(scale) <= 64 + 16
    assert nbytes_of(None) == 0


def test_inputs_of_their_own_say_more_than_gradients() -> None:
    even, far = torch.eye(64)[None], torch.diag(uneven())[None]
    assert column_scales(known(even), -0.25, 64) is None
    assert column_scales(replace(known(even), inputs=far), -0.25, 64) is not None


@pytest.mark.parametrize("layout", [Blocks(2, 1), Blocks(1, 2)], ids=str)
def test_groups_have_no_scales_and_blocks_of_columns_have(layout: Blocks) -> None:
    width = 64 // layout.column_blocks
    moments = torch.diag(uneven(width)).expand(layout.groups * layout.column_blocks, -1, -1)
    scale = column_scales(replace(known(moments), layout=layout), -0.25, 64 - layout.column_blocks + 1)
    assert (scale is None) == (layout.groups > 1)
    assert scale is None or len(scale) == 63


@pytest.mark.parametrize("with_unseen", [True, False])
def test_errors_of_a_scaled_weight_cost_what_they_cost(with_unseen: bool) -> None:
    moments = correlated(1, 64, samples=500)
    stats = known(moments, correlated(1, 64, samples=100) if with_unseen else None)
    scale = log_step(1 / uneven())
    scaled = scaled_stats(stats, scale)
    error = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)).double()
    costs = []
    for one, matrix in ((stats, error), (scaled, error / scale)):
        assert one.judge is not None
        judge = one.judge[0].double()
        costs.append(one.rows * ((matrix @ judge) * matrix).sum(1) / judge.trace())
    assert torch.allclose(costs[0], costs[1], rtol=1e-5)


def test_rounding_with_scales_is_rounding_what_they_divide() -> None:
    """The slow reference: column after column, in float64."""
    moments, matrix, scale = correlated(1, 64, samples=500), weight(), log_step(1 / uneven() ** 0.25)
    stats = scaled_stats(known(moments), scale)
    assert stats.moments is not None
    factored = factor(stats.moments)
    target = replace(plain_target(matrix, VIEW, stats, scale=scale), factored=factored)
    steps = target.steps(-12, "int8")
    codes, steps = solve(target, steps, "int8")
    rest = (matrix.double() / scale.double()).clone()
    expected = torch.zeros_like(rest)
    order, spill = factored.order[0], factored.spill[0].double()
    for place, column in enumerate(order.tolist()):
        expected[:, column] = (rest[:, column] / steps.double()).round()
        error = matrix[:, column].double() / scale[column] - expected[:, column] * steps  # from the weight itself
        rest[:, order[place + 1 :]] += error[:, None] * spill[place, place + 1 :]
    assert float((codes != expected).double().mean()) < 0.01  # where float32 falls to the other side
    decoded = Grid("int8", scaled=True).encode(matrix, steps, VIEW, scale).decode()
    assert float((decoded - matrix).abs().amax()) <= float((steps[:, None] * scale).amax()) / 2 * 1.001


def test_scales_are_taken_where_unseen_calls_say_that_they_pay() -> None:
    far, near = torch.diag(uneven() ** 2)[None], torch.eye(64)[None]
    assert chosen_scales(weight(), VIEW, known(far)) is not None
    assert chosen_scales(weight(), VIEW, known(far + near, near)) is None, "other calls have even inputs"
    assert chosen_scales(torch.zeros(48, 64), VIEW, known(far)) is None
    assert chosen_scales(weight(), VIEW, TensorStats(torch.ones(48, dtype=torch.float64))) is None


class Odd(nn.Module):
    """Weights that may have scales, and weights that may not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.own = nn.Linear(16, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.table.weight  # of a product, too: it has moments
        self.attention = nn.MultiheadAttention(16, 2)
        self.convolution = nn.Conv1d(16, 16, 1)


def test_only_what_reads_them_in_codes_may_have_scales() -> None:
    allowed = {one.name for one in find_tensors(Odd()) if may_scale(one)}
    assert allowed == {"own.weight", "table.weight"}


def uneven_network() -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        net[0].weight /= uneven().sqrt()
    return net, [torch.randn(32, 64) * uneven() for _ in range(4)]


def test_fit_takes_them_and_loses_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged on inputs that calibrated nothing."""
    net, data = uneven_network()
    unseen = torch.randn(500, 64) * uneven()
    lost, scaled = [], []
    for powers in (choice.POWERS, ()):
        monkeypatch.setattr(choice, "POWERS", powers)
        quantized = pared.fit(net, pared.PostTrainingQuantConfig(max_size=4000), data, quiet=True)
        formats = [one.coded.format for one in contents_of(quantized).tensors]
        scaled.append(any(isinstance(one, Grid) and one.scaled for one in formats))
        with torch.no_grad():
            lost.append(float((quantized(unseen) - net(unseen)).square().mean()))
    assert scaled == [True, False]
    assert lost[0] < 0.9 * lost[1]
