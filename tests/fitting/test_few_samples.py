"""Few samples tell what 8 bits of weights cost, where that is far from too much."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.fitting.calibration import sensitivity
from pared.fitting.calibration.sensitivity import Sensitivity, TensorStats
from pared.fitting.config import Approach
from pared.fitting.rounding.precision import is_clear
from pared.model.tensors import find_tensors

CALLS = [torch.randn(1, 32, generator=torch.Generator().manual_seed(i)) for i in range(20)]


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many probes each measurement takes."""
    taken: list[int] = []
    real = sensitivity.measure

    def measure(tensors: Any, calls: Any, *args: Any, rounds: int | None = None) -> Sensitivity | None:
        taken.append(len(calls) * (rounds or 0))
        return real(tensors, calls, *args, rounds=rounds)

    monkeypatch.setattr(sensitivity, "measure", measure)
    return taken


def even() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 8)


def uneven() -> nn.Linear:
    """Eight bits do too much damage: a large column, whose input is small, sets the steps of all."""
    layer = even()
    with torch.no_grad():
        layer.weight[:, 0] *= 3000
    return layer


def some_calls(model: nn.Linear) -> list[Tensor]:
    scale = torch.ones(32)
    sizes = model.weight.detach().abs().mean(0)
    scale[0] = sizes[1] / sizes[0]
    return [call * scale for call in CALLS]


@pytest.mark.parametrize(
    ("make", "approach", "expected"),
    [(even, "weight_only", [4]), (uneven, "weight_only", [4, 16]), (even, "auto", [16])],
)
def test_probes_go_on_where_few_do_not_tell(make: Any, approach: Approach, expected: list[int], probes: Any) -> None:
    model = make()
    q = pared.fit(model, PostTrainingQuantConfig(quant_level=0, approach=approach), some_calls(model))
    assert probes == expected
    (weight,) = (line for line in q.pared.plan if line.name == "weight")
    assert (weight.bits > 8) == (make is uneven)


def test_what_few_samples_have_not_reached_is_not_clear() -> None:
    tensors = find_tensors(even())
    rows = torch.full((8,), 1e-6).double()
    assert is_clear(tensors, {"weight": TensorStats(rows)})
    assert not is_clear(tensors, {"weight": TensorStats(rows * 0)})
    assert not is_clear(tensors, {"weight": TensorStats(rows * 1e9)})
