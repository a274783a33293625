"""Tensors whose numbers are not those of a storage: refused by every verb that would need them, with their names."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pared
from pared.errors import ConfigError, ModelError, ParedError

UNUSUAL: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "coordinates": ("sparse tensor", lambda: torch.eye(8).to_sparse()),
    "rows": ("sparse tensor", lambda: torch.eye(8).to_sparse_csr()),
    "blocks": ("sparse tensor", lambda: torch.eye(8).to_sparse_bsr((2, 2))),
    "nested": ("nested tensor", lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(4)])),
    "jagged": (
        "nested tensor",
        lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(4)], layout=torch.jagged),
    ),
    "quantized": ("qint8", lambda: torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, torch.qint8)),
    "eight bits": ("float8_e4m3fn", lambda: torch.randn(8, 8).to(torch.float8_e4m3fn)),
}


class Odd(nn.Module):
    def __init__(self, odd: Tensor) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)
        self.register_buffer("odd", odd)


@pytest.mark.parametrize("name", UNUSUAL)
def test_every_verb_names_what_it_cannot_store(name: str, tmp_path: Path) -> None:
    label, make = UNUSUAL[name]
    with warnings.catch_warnings():  # torch says that such tensors are new or old
        warnings.simplefilter("ignore")
        odd = make()
        torch.save({"w": torch.randn(8, 8), "odd": odd}, tmp_path / "m.pt")
    with pytest.raises(ModelError, match="odd: has a type or layout that no format can hold"):
        pared.fit(Odd(odd))
    pared.save(pared.fit(nn.Linear(8, 8), quiet=True), tmp_path / "other")
    with pytest.raises(ParedError, match="odd"):
        pared.load(tmp_path / "other", Odd(odd))
    with pytest.raises(ConfigError, match=f"odd.*: is of type {label}, which an artifact cannot hold"):
        pared.compress(tmp_path / "m.pt", tmp_path / "c")
    assert label in str(pared.inspect(tmp_path / "m.pt"))
    assert pared.compare(tmp_path / "m.pt", tmp_path / "m.pt").a.tensors >= 2


@pytest.mark.parametrize("bit", ["conj", "neg"])
def test_lazy_views_are_resolved_or_refused(bit: str, tmp_path: Path) -> None:
    numbers = torch.randn(4, 4, dtype=torch.cfloat).conj()
    odd = numbers if bit == "conj" else numbers.imag
    torch.save({"w": torch.randn(8, 8), "odd": odd}, tmp_path / "m.pt")
    with pytest.raises(ConfigError, match=f"odd: is of type {bit} view"):
        pared.compress(tmp_path / "m.pt", tmp_path / "c")
    model = Odd(odd)
    q = pared.fit(model, pared.PostTrainingQuantConfig(rules=[pared.Rule("odd", keep=True)]), quiet=True)
    pared.save(q, tmp_path)
    assert torch.equal(pared.load(tmp_path, Odd(odd)).odd, odd)
