"""`memory="small"`: every weight stays as it is in the file, and reads as floats."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import dual_path
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

import pared
from pared import ConfigError, CorruptError, PostTrainingQuantConfig, Rule
from pared.artifact.envelope import open_records
from pared.formats.encoded.codes import EncodedCodes
from pared.runtime.float_forms import floats_of
from pared.runtime.layers.counterpart import Counterpart
from tests.runtime.counterparts import CASES


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
        for encoded in module.pared_encoded.values() if isinstance(module, Counterpart) else ():
            seen[id(encoded)] = encoded.nbytes
    return sum(seen.values())


def equal(found: Any, expected: Any) -> bool:
    ours, theirs = (tree_leaves(tuple(one) if isinstance(one, PackedSequence) else one) for one in (found, expected))
    return len(ours) == len(theirs) > 0 and all(
        torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None
    )


@pytest.mark.filterwarnings("ignore:.*zero-padded copy")
@pytest.mark.parametrize("bits", [3, 12])
@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_what_it_is_on_floats(name: str, bits: int, tmp_path: Path) -> None:
    """Outputs, the file, the state and copies are those of a model that holds floats."""
    make, args, kwargs = CASES[name]
    torch.manual_seed(0)
    fast = pared.fit(make().eval(), PostTrainingQuantConfig(approach="weight_only", rules=[Rule("*", bits=bits)]))
    path = pared.save(fast, tmp_path)
    small = pared.load(tmp_path, model=make(), memory="small")
    held = [module for module in small.modules() if isinstance(module, Counterpart) and module.pared_encoded]
    assert held
    assert not any(module._buffers for module in held), "no codes beside the bytes"
    with torch.no_grad():
        expected = fast(*args, **kwargs)
        assert equal(small(*args, **kwargs), expected)
        assert equal(copy.deepcopy(small)(*args, **kwargs), expected)
        again: Any = pickle.loads(pickle.dumps(small))
        assert equal(again(*args, **kwargs), expected)
    assert pared.save(small, tmp_path / "again").read_bytes() == path.read_bytes()
    state, floats = small.state_dict(), fast.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {name: one.dtype for name, one in floats.items()}
    assert all(torch.equal(state[name], floats[name]) for name in floats)


def test_a_weight_is_decoded_once_for_each_call_of_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(nn.Sequential(nn.LSTM(12, 16, 2, bidirectional=True)), tmp_path)
    small: Any = pared.load(tmp_path, model=nn.Sequential(nn.LSTM(12, 16, 2, bidirectional=True)), memory="small")
    decoded: list[EncodedCodes] = []
    decode = EncodedCodes.decode

    def counted(codes: EncodedCodes) -> Tensor:
        decoded.append(codes)
        return decode(codes)

    monkeypatch.setattr(EncodedCodes, "decode", counted)
    for _ in range(2):
        small(torch.ones(5, 12))
    assert len(decoded) == 2 * len(set(decoded)) == 2 * 8


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    saved(model, tmp_path)
    small: Any = pared.load(tmp_path, model=Mixed(), memory="small")
    state = small.state_dict()
    assert state["head.weight"] is state["table.weight"]
    other = pared.fit(Mixed().eval(), PostTrainingQuantConfig(approach="weight_only"))
    small.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(small(IDS), other(IDS))
    for one in (small, copy.deepcopy(small)):
        assert one.head.pared_encoded["weight"] is one.table.pared_encoded["weight"]
    floats: Any = floats_of(small)
    assert floats.head.weight is floats.table.weight


def test_a_state_of_other_codes_is_refused(tmp_path: Path) -> None:
    saved(nn.Sequential(nn.Linear(16, 8)), tmp_path)
    small: Any = pared.load(tmp_path, model=nn.Sequential(nn.Linear(16, 8)), memory="small")
    wrong = {**small.state_dict(), "0.weight": torch.zeros(8, 16, dtype=torch.int16)}
    with pytest.raises(RuntimeError, match=r"0.weight: expected int8 codes \[8, 16\], found torch.int16 \[8, 16\]"):
        small.load_state_dict(wrong)


def test_damage_is_found_when_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "best_model.pt"
    saved(nn.Sequential(nn.Linear(64, 64)), tmp_path)
    with open_records(path) as records:
        place = path.read_bytes().index(bytes(records.data[:64]))
    data = bytearray(path.read_bytes())
    data[place + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="the checksum of its numbers does not match"):
        pared.load(tmp_path, model=nn.Sequential(nn.Linear(64, 64)), memory="small")


def test_gradients_flow_through_inputs_and_captures_keep_the_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q = saved(nn.Sequential(nn.Linear(16, 8)).eval(), tmp_path)
    small: Any = pared.load(tmp_path, model=nn.Sequential(nn.Linear(16, 8)), memory="small")
    x = torch.randn(3, 16, requires_grad=True)
    (ours,), (theirs,) = (torch.autograd.grad(one(x).sum(), x) for one in (small, q))
    assert torch.equal(ours, theirs)
    exported = torch.export.export(small, (x.detach(),)).module()
    assert torch.equal(exported(x), q(x))
    assert torch.equal(small(x), q(x))
    assert small.to(torch.bfloat16)[0].weight.dtype == torch.bfloat16
    assert small.to("meta")[0].weight.is_meta


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
    assert "weights stay as they are in the file; decoding all of them takes " in small.report()


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
