"""Calls with the first samples of recorded ones stand for these only where the model gives the same for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pared.fitting.calibration import observe
from pared.fitting.measured.parts import of_samples, small_call


class Centred(nn.Module):
    """What it gives for a sample depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x - x.mean(0))
        return out


class Fixed(Centred):
    """It takes calls of one size only."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.reshape(40, 4))
        return out


class Summed(Centred):
    """Its output does not count samples."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x).sum(0)
        return out


@pytest.mark.parametrize(
    ("make", "small", "some"),
    [(lambda: nn.Linear(4, 3), 1, 16), (Centred, 40, 40), (Fixed, 40, 40), (Summed, 40, 40)],
)
def test_fewer_samples_where_each_is_on_its_own(make: Callable[[], nn.Module], small: int, some: int) -> None:
    model = make()
    seen = observe.collect(model, [torch.randn(40, 4), torch.randn(40, 4)], 100)
    assert len(small_call(model, seen).args[0]) == small
    found = of_samples(model, seen, 16)
    assert (found.samples, len(found.calls[0].args[0])) == (some, some)
    with torch.no_grad():
        energy = float(model(found.calls[0].args[0]).double().square().sum())
    assert found.energies["output", False, ""] == pytest.approx(energy)


def test_calls_stay_whole_that_are_small_beside_what_is_wanted() -> None:
    model = nn.Linear(4, 3)
    assert of_samples(model, observe.collect(model, [torch.randn(20, 4)], 100), 16).samples == 20
    seen = observe.collect(nn.Linear(4, 3), [torch.randn(6, 4) for _ in range(5)], 100)
    found = of_samples(nn.Linear(4, 3), seen, 16)
    assert [len(call.args[0]) for call in found.calls] == [6, 6, 6]
