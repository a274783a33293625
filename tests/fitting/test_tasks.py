"""Models that do what a text or a flag asks for: results that are small count as much as large ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from tests.runtime.exports import sqnr

SCALES = {"large": 1e3, "middle": 1.0, "small": 1e-3}


class Tasks(nn.Module):
    """One trunk, and a head for each task, whose results are of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.heads = nn.ModuleDict({name: nn.Linear(64, 16, bias=False) for name in SCALES})

    def forward(self, x: Tensor, task: str, doubled: bool = False) -> Tensor:
        y: Tensor = self.heads[task](self.trunk(x)) * SCALES[task]
        return 2 * y if doubled else y


@pytest.mark.parametrize("config", [PostTrainingQuantConfig(quant_level=0), None], ids=["8 bits", "default"])
def test_every_task_counts(config: Any) -> None:
    torch.manual_seed(0)
    model = Tasks().eval()
    calls = [{"x": torch.randn(16, 64), "task": task} for task in SCALES for _ in range(2)]
    q = pared.fit(model, config, calls, quiet=True)
    x = torch.randn(64, 64)
    with torch.no_grad():
        found = {task: sqnr(q(x, task).numpy(), model(x, task).numpy()) for task in SCALES}
    assert min(found.values()) > 25, found
    assert max(found.values()) - min(found.values()) < 12, found


def test_the_damage_of_every_task_is_reported() -> None:
    torch.manual_seed(0)
    calls = [{"x": torch.randn(16, 64), "task": task} for task in SCALES]
    q: Any = pared.fit(Tasks().eval(), PostTrainingQuantConfig(quant_level=0), calls, quiet=True)
    outputs = dict(pared.runtime.record.record_of(q).outcome.damage.outputs)
    assert set(outputs) == {f"output (task='{task}')" for task in SCALES}
