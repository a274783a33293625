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


class Padded(nn.Module):
    """Sequences with lengths: what lies behind the end of one is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(16, 16, batch_first=True, bidirectional=True)
        self.last = nn.Linear(32, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.last(self.layer(x * mask[..., None])[0]) * mask[..., None]
        return out


@pytest.mark.parametrize(("to", "file"), [("onnx", "model.onnx"), ("openvino", "openvino_model.xml")])
def test_a_size_that_the_capture_fixes_is_told(
    to: str, file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1, int(x.shape[1]) * 16) if x.shape[1] == 5 else x[:, 0]

    steps = nn.Sequential(nn.Linear(16, 16), Last())
    q = pared.fit(steps, quiet=True)
    with caplog.at_level(logging.WARNING, "pared"):
        exported = pared.export(q, tmp_path, torch.randn(3, 5, 16), to=to)
    assert exported.inputs["input"][1:] == (5, 16)
    assert f"{file} takes input only with 5 in dimension 1, where the model itself takes other sizes" in caplog.text
    assert "dimension 2" not in caplog.text, "that belongs to the weights"
    caplog.clear()
    for dynamic in (False, {"input": {0: torch.export.Dim("rows")}}):
        pared.export(q, tmp_path, torch.randn(3, 5, 16), to=to, dynamic=dynamic)
    assert "other sizes" not in caplog.text, "it was asked for"


@pytest.mark.parametrize("length", [6, 16])  # the latter is that of another dimension, too
def test_sequences_and_their_mask_are_fixed_together(
    length: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch = (torch.randn(3, length, 16), torch.ones(3, length))
    q = pared.fit(Padded(), pared.PostTrainingQuantConfig(approach="weight_only"), [batch], quiet=True)
    with caplog.at_level(logging.WARNING, "pared"):
        pared.export(q, tmp_path, batch)
    told = [one.getMessage() for one in caplog.records if "other sizes" in one.getMessage()]
    assert [one.partition(",")[0] for one in told] == [
        f"model.onnx takes {name} only with {length} in dimension 1" for name in ("x", "mask")
    ]
