"""What cannot be exported is refused with a reason, and what is not in the graph is told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import g2p
from torch import Tensor, nn

import pared
from pared import ModelError

pytestmark = pytest.mark.engine


class Hesitant(nn.Linear):
    """A value decides which way it goes, as in examples/dual_path.py."""

    def forward(self, x: Tensor) -> Tensor:
        peak = float(x.abs().max())
        return super().forward(x / peak if peak > 1 else x)


@pytest.mark.parametrize(
    ("make", "batch", "reason"),
    [
        (lambda: Hesitant(64, 8), lambda: torch.randn(3, 64), "data-dependent"),
        (g2p.load, lambda: g2p.calibration(4)[0], "FakeTensor"),  # packed sequences
    ],
    ids=["hesitant", "g2p"],
)
def test_a_model_that_cannot_be_captured_says_why(make: Any, batch: Any, reason: str, tmp_path: Path) -> None:
    q = pared.fit(make(), quiet=True)
    with pytest.raises(ModelError, match=f"cannot be exported: .*{reason}") as caught:
        pared.export(q, tmp_path, batch())
    assert caught.value.__cause__ is not None
    assert list(tmp_path.iterdir()) == []


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a quantized model"):
        pared.export(nn.Linear(2, 2), tmp_path, torch.randn(2, 2))


def test_a_model_keeps_its_own_export(tmp_path: Path) -> None:
    class Own(nn.Linear):
        def export(self) -> str:
            return "its own"

    q = pared.fit(Own(64, 8), quiet=True)
    assert q.export() == "its own"
    assert pared.export(q, tmp_path, torch.randn(2, 64)).path.is_file()


def test_inputs_that_do_not_fit_are_refused_before_the_work(tmp_path: Path) -> None:
    q = pared.fit(nn.Linear(64, 8), quiet=True)
    with pytest.raises(pared.CalibrationError, match="does not fit forward"):
        pared.export(q, tmp_path, {"nonsense": torch.randn(2, 64)})
    with pytest.raises(ModelError, match="raised RuntimeError on the example inputs"):
        pared.export(q, tmp_path, torch.randn(2, 63))


def test_what_is_not_in_the_graph_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(64, 8), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    q = pared.fit(Spare(), quiet=True)
    with caplog.at_level(logging.WARNING, "pared"):
        exported = pared.export(q, tmp_path, torch.randn(3, 64))
    assert exported.floats == {"spare.weight": "the graph does not use it"}
    assert exported.codes == ("used.weight",)
