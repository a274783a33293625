"""Mixtures of experts: one parameter holds the weights of all of them, and calibration reaches some."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.fitting.calibration import sensitivity
from pared.fitting.calibration.blocks import Blocks
from pared.fitting.calibration.observe import collect
from pared.fitting.calibration.orientation import oriented
from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding.curves import sample_rows
from pared.fitting.rounding.feedback import factor
from pared.fitting.rounding.importance import make_target
from pared.fitting.rounding.targets import solve
from pared.formats.views import View
from pared.model.tensors import find_tensors
from tests.ratios import snr


class Fused(nn.Module):
    """Four experts in one parameter each for what goes in and what comes out; the router never takes the last one."""

    def __init__(self, *, transposed: bool = False, reached: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transposed = transposed
        self.gate = nn.Linear(32, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 48, 32) / 6), nn.Parameter(torch.randn(4, 32, 48) / 7)
        with torch.no_grad():
            self.gate.bias[reached:] = -1000
            self.up.mul_(torch.logspace(-2, 2, 4 * 48, base=2).reshape(4, 48, 1))  # each row has a scale of its own
        if transposed:
            self.up, self.down = (nn.Parameter(w.detach().transpose(1, 2).contiguous()) for w in (self.up, self.down))

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for e in chosen.unique():
            up, down = (w[e].T if self.transposed else w[e] for w in (self.up, self.down))
            out[chosen == e] = F.linear(F.linear(x[chosen == e], up).relu(), down)
        return out + 0.01 * self.gate(x).mean()


X = torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
BATCHES = [X[:32], X[32:64], X[64:]]


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("conf", [PostTrainingQuantConfig(), PostTrainingQuantConfig(quant_level=0)])
def test_each_expert_has_a_step_for_each_output_channel(
    transposed: bool, conf: PostTrainingQuantConfig, tmp_path: Path
) -> None:
    model = Fused(transposed=transposed).requires_grad_(False)
    q = pared.fit(model, conf, BATCHES, quiet=True)
    state = q.state_dict()
    assert state["up_step"].shape == (4, 48)
    assert state["down_step"].shape == (4, 32)
    assert snr(model(X), q(X)) > 20
    q.save(tmp_path)
    again = pared.load(tmp_path, Fused(transposed=transposed))
    assert torch.equal(again(X), q(X))
    small = pared.load(tmp_path, Fused(transposed=transposed), memory="small")
    assert torch.equal(small(X), q(X))
    other = pared.load(tmp_path, Fused(transposed=transposed))
    other.load_state_dict(state)
    assert torch.equal(other(X), q(X))


@pytest.mark.slow
@pytest.mark.parametrize("conf", [PostTrainingQuantConfig(), PostTrainingQuantConfig(quant_level=0)])
def test_experts_that_calibration_does_not_reach_are_as_fine_as_the_others_and_it_is_said(
    conf: PostTrainingQuantConfig,
) -> None:
    model = Fused().requires_grad_(False)
    q = pared.fit(model, conf, BATCHES, quiet=True)
    steps = q.state_dict()["down_step"]
    assert steps[3].mean() <= 1.1 * steps[:3].mean()
    assert snr(model.down[3], q.down[3]) > 10
    assert "1 of its 4 matrices" in str(q.report())


@pytest.mark.slow
@pytest.mark.parametrize("conf", [PostTrainingQuantConfig(), PostTrainingQuantConfig(quant_level=0)])
def test_modules_that_calibration_does_not_reach_are_named(conf: PostTrainingQuantConfig) -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.experts = nn.Linear(32, 3), nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
            with torch.no_grad():
                self.gate.bias[2] = -1000

        def forward(self, x: Tensor) -> Tensor:
            chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                out[chosen == i] = expert(x[chosen == i])
            return out

    model = Apart().requires_grad_(False)
    q = pared.fit(model, conf, BATCHES, quiet=True)
    assert snr(model.experts[2](X), q.experts[2](X)) > 20
    assert "calibration gave this expert 0 tokens" in str(q.report())


def test_a_long_row_has_bounded_moments() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(2, 8, 40000))

        def forward(self, x: Tensor) -> Tensor:
            return (self.rows * x).sum(-1)

    model = Table()
    seen = collect(model, [torch.randn(40000), torch.randn(40000)], 100)
    found = sensitivity.measure(find_tensors(model), seen.calls, seen.energies, 0)
    assert found is not None
    moments = found.tensors["rows"].moments
    assert moments is not None
    assert moments.numel() < 2 * max(1 << 22, 16 * model.rows.numel())


def test_rows_of_large_groups_are_sampled() -> None:
    matrix = torch.randn(16 * 256, 4096)
    stats = TensorStats(torch.ones(len(matrix), dtype=torch.float64), layout=Blocks(16))
    rows = sample_rows(make_target(matrix, View((16, 256, 4096), (0, 1)), stats))
    assert rows.shape == (8, 16)
    assert torch.equal(rows // 256, (rows // 256)[:, :1].expand_as(rows))  # a group each


@pytest.mark.parametrize("groups", [1, 3])
def test_the_groups_of_a_stack_are_rounded_apart(groups: int) -> None:
    """As three matrices alone are rounded, also where rows are rounded again because their codes left the type."""
    matrix, inputs = torch.randn(3 * 8, 16), torch.randn(3, 40, 16)
    matrix[5, 3] = matrix[11, 2] = 40.0
    moments = (inputs.transpose(1, 2) @ inputs)[:groups]
    stats = TensorStats(torch.ones(24, dtype=torch.float64), moments, layout=Blocks(groups))
    target = make_target(matrix, View((24, 16), (0,)), stats)
    target = replace(target, factored=factor(moments))
    codes, steps = solve(target, target.steps(-40, "int8"), "int8")
    for group in range(groups):
        size = 24 // groups
        rows = slice(group * size, (group + 1) * size)
        alone = replace(
            target,
            matrix=matrix[rows],
            factored=factor(moments[group : group + 1]),
            layout=Blocks(),
            exponents=target.exponents[rows],
            absmax=target.absmax[rows],
        )
        expected, own = solve(alone, alone.steps(-40, "int8"), "int8")
        assert torch.equal(codes[rows], expected)
        assert torch.equal(steps[rows], own)


def test_slices_of_a_stack_have_the_gradients_that_they_have_without_a_watch() -> None:
    model = Fused(reached=4).requires_grad_(False)
    seen = collect(model, [X], 100)
    tensors = oriented(find_tensors(model), seen.calls)
    found = sensitivity.measure(tensors, seen.calls, seen.energies, 0)
    assert found is not None
    rows = found.tensors["up"].rows.reshape(4, 48)
    assert bool((rows.sum(1) > 0).all())
    assert found.tensors["up"].moments is not None
    assert found.tensors["up"].moments.shape == (4, 32, 32)


class Chosen(nn.Module):
    """The first number of a sample says which expert it is for.

    Args:
        fused: the experts are one parameter.
    """

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused = fused
        self.stack = nn.Parameter(torch.randn(4, 32, 32) / 6) if fused else None
        self.experts = nn.ModuleList([] if fused else [nn.Linear(32, 32) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(4):
            mine = x[:, 0] == e
            if mine.any():
                expert = self.stack[e].T if self.stack is not None else self.experts[e].weight.T
                out[mine] = x[mine] @ expert
        return out


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_experts_of_samples_of_one_half_count(fused: bool, calls: int) -> None:
    model, x = Chosen(fused=fused).eval(), torch.randn(60, 32)
    # Some experts are only for even samples, or for the first call; others only for odd ones, or for the second.
    x[:, 0] = torch.arange(60) % 2 * 2 + torch.arange(60) // 2 % 2 if calls == 1 else torch.arange(60) * 4 // 60
    q = pared.fit(model, None, list(x.chunk(calls)), quiet=True)
    for e in range(4):
        mine = x[x[:, 0] == e]
        assert snr(model(mine), q(mine)) > 25
