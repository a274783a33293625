"""`memory="small"`: every weight stays in codes, and reads as floats."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import dual_path
from torch import Tensor, nn

import pared
from pared import ConfigError, PostTrainingQuantConfig, Rule
from pared.runtime.layers.counterpart import Counterpart


class Mixed(nn.Module):
    """Layers with and without a counterpart, a tied weight, a raw parameter, a list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.lstm = nn.LSTM(32, 32, batch_first=True, bidirectional=True)
        self.rnn = nn.RNN(64, 32, batch_first=True)
        self.raw = nn.Parameter(torch.randn(32, 32))
        self.many = nn.ParameterList([torch.randn(32, 32) for _ in range(2)])
        self.normal = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.rnn(self.lstm(x + self.attention(x, x, x)[0])[0])[0]
        for weight in (self.raw, *self.many):
            x = torch.tanh(x @ weight)
        out: Tensor = self.head(self.normal(x))
        return out


IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def saved(model: nn.Module, directory: Path) -> nn.Module:
    q = pared.fit(model, PostTrainingQuantConfig(approach="weight_only"))
    pared.save(q, directory)
    return q


def resident(model: nn.Module) -> int:
    """Bytes of everything that the modules hold, once."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def test_outputs_and_state_are_the_same_in_a_third_of_the_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    q = saved(model, tmp_path)
    small = pared.load(tmp_path, model=Mixed(), memory="small")
    with torch.no_grad():
        assert torch.equal(small(IDS), q(IDS))
    ours, theirs = small.state_dict(), q.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    parametrized = 4 * 32 * 33  # torch's own property stands where ours would
    assert resident(small) - parametrized <= 0.35 * 4 * sum(p.numel() for p in model.parameters())
    assert resident(copy.deepcopy(small)) == resident(small)
    again = pared.save(small, tmp_path / "again")
    assert again.read_bytes() == (tmp_path / "best_model.pt").read_bytes()


@pytest.mark.model
def test_the_dual_path_network_in_a_third_of_its_memory(tmp_path: Path) -> None:
    model = dual_path.load()
    q = saved(model, tmp_path)
    small = pared.load(tmp_path, model=dual_path.skeleton(), memory="small")
    assert resident(small) <= 0.35 * 4 * sum(p.numel() for p in model.parameters())
    x = dual_path.calibration(1)[0]
    with torch.no_grad():
        assert torch.allclose(small(x), q(x), atol=1e-6)
    clone = pickle.loads(pickle.dumps(small))
    assert any(isinstance(module, Counterpart) for module in clone.modules())
    assert resident(clone) == resident(small)


def test_the_report_tells_what_it_costs(tmp_path: Path) -> None:
    saved(nn.Sequential(nn.Linear(64, 64)), tmp_path)
    small: Any = pared.load(tmp_path, model=nn.Sequential(nn.Linear(64, 64)), memory="small")
    assert "weights stay in codes; decoding all of them takes " in small.report()


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory='tiny' is not one of 'fast', 'small'"):
        pared.load(tmp_path, model=nn.Linear(2, 2), memory="tiny")  # type: ignore[call-overload]  # on purpose


def test_a_table_is_read_by_rows(tmp_path: Path) -> None:
    table = nn.Embedding(4096, 16)
    q = pared.fit(nn.Sequential(table), PostTrainingQuantConfig(approach="dynamic", quant_level=0))
    pared.save(q, tmp_path)
    small: Any = pared.load(tmp_path, model=nn.Sequential(nn.Embedding(4096, 16)), memory="small")
    assert {line.kernel for line in small.plan} == {"int8 gather"}
    assert torch.allclose(small(torch.tensor([4, 4095])), table(torch.tensor([4, 4095])), atol=0.02)


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("bits", [8, 12])
def test_a_table_is_never_decoded_whole(make: Any, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    conf = PostTrainingQuantConfig(approach="weight_only", rules=[Rule("*", bits=bits)])
    q = pared.fit(nn.Sequential(make(512, 16)), conf)
    pared.save(q, tmp_path)
    small: Any = pared.load(tmp_path, model=nn.Sequential(make(512, 16)), memory="small")
    ids = torch.randint(0, 512, (3, 5))
    expected = q(ids)

    def whole(*_: object) -> Tensor:
        raise AssertionError("the table was decoded")

    monkeypatch.setattr(Counterpart, "pared_decode", whole)
    assert torch.equal(small(ids), expected)
