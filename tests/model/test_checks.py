"""Models that cannot be compressed are refused before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pared
from pared.errors import ModelError


def with_plain_attribute() -> nn.Module:
    model = nn.Identity()
    model.weight = torch.ones(8, 8)  # as people do who forget register_buffer
    return model


EMPTY: dict[str, Any] = {
    "no tensors": lambda: nn.Sequential(nn.ReLU(), nn.Flatten()),
    "sizes of zero": lambda: nn.ParameterDict(
        {"w": nn.Parameter(torch.zeros(0, 8)), "b": nn.Parameter(torch.zeros(0))}
    ),
    "a tensor that is neither": with_plain_attribute,
}


@pytest.mark.parametrize("model", EMPTY)
def test_an_empty_model_is_an_error(model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no numbers to compress"):
        pared.fit(EMPTY[model](), quiet=True)
    with pytest.raises(ModelError, match="has no numbers to compress"):
        pared.fit(EMPTY[model](), None, [torch.ones(2, 8)], lambda _: 1.0, workspace=tmp_path, quiet=True)
    with pytest.raises(ModelError, match="has no numbers to compress"):
        pared.estimate(EMPTY[model]())
