"""A small network, its inputs, and what each sample loses when it is compressed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import pared
from pared import AccuracyCriterion, PostTrainingQuantConfig

X = torch.randn(256, 48, generator=torch.Generator().manual_seed(0))
BATCHES = [X[i : i + 32] for i in range(0, 256, 32)]


def build() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 8))


MODEL = build()
with torch.no_grad():
    # torch's first `tanh` of a process is now and then 5e-5 off in the rows of one thread (in 3 of 17,300 new
    # processes, torch 2.13 with MKL); repeated calls were right. So the first pass is thrown away.
    MODEL(X)
    EXPECTED = MODEL(X)


@torch.no_grad()
def lost(model: nn.Module) -> np.ndarray[Any, Any]:
    """What each sample lost, as a share of the mean energy."""
    found: np.ndarray[Any, Any] = ((model(X) - EXPECTED).square().sum(1) / EXPECTED.square().sum(1).mean()).numpy()
    return found


def conf(loss: float = 0.0, **options: Any) -> PostTrainingQuantConfig:
    criterion = AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=loss)
    return PostTrainingQuantConfig(accuracy_criterion=criterion, **options)


def size(model: Any, tmp_path: Path) -> int:
    return pared.save(model, tmp_path).stat().st_size
