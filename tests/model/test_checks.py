"""Models that cannot be compressed are refused before any work."""

from collections.abc import Callable
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


def nested(depth: int) -> nn.Module:
    inner: nn.Module = nn.Linear(4, 4)
    for _ in range(depth - 1):
        inner = nn.Sequential(inner)
    return inner


def test_modules_nested_too_deep_are_an_error_everywhere(tmp_path: Path) -> None:
    model, x = nested(2000), torch.randn(8, 4)
    pared.save(pared.fit(nn.Linear(4, 4)), tmp_path)
    attempts: list[Callable[[], object]] = [
        lambda: pared.fit(model),
        lambda: pared.fit(model, calib_dataloader=[x]),
        lambda: pared.trade_off(model, calib_dataloader=[x]),
        lambda: pared.estimate(model),
        lambda: pared.load(tmp_path, model=model),
        lambda: pared.inspect(model),
    ]
    for attempt in attempts:
        with pytest.raises(ModelError, match=r"^Sequential: its modules nest (2,000 deep|deeper)") as caught:
            attempt()
        assert "raise sys.setrecursionlimit" in str(caught.value)


def test_modules_nested_as_deep_as_torch_walks_are_compressed(tmp_path: Path) -> None:
    model = nested(500)
    q = pared.fit(model)
    assert "Linear" in repr(list(q.modules())[-1])
    assert sorted(q.state_dict()) == [f"{'0.' * 499}bias", f"{'0.' * 499}weight", f"{'0.' * 499}weight_step"]
    pared.save(q, tmp_path)
    loaded = pared.load(tmp_path, model=model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), q.parameters(), strict=True))
    assert "0.0.0" in q.report()
