"""State dicts of plain numbers, and what is left of them after compression and expansion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import pared

State = dict[str, Tensor]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saved(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def there_and_back(state: object, where: Path, **options: Any) -> State:
    """What is left of a state dict after compression and expansion."""
    path = pared.compress(saved(state, where / "model.pt"), where / "small", **options)
    assert path == where / "small" / "best_model.pt"
    return safetensors.torch.load_file(pared.expand(path, where / "big.safetensors"))


def layers() -> State:
    return {f"{i}.weight": drawn(80 + 40 * i, 200, seed=i) * 4.0**-i for i in range(6)}
