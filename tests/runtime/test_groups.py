"""A model whose weights are on grids with groups: its state dict, and all ways of keeping and moving it."""

import copy
import pickle
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import pared
from pared.artifact.envelope import open_records
from pared.artifact.parse import parse_index
from pared.errors import ModelError
from pared.formats.activation import Activation
from pared.formats.coded import Coded, Grid, Grouped
from pared.model import storage
from pared.model.contents import Contents, Decision, Stored
from pared.runtime.record import contents_of
from tests.formats.groups.grids import GRIDS

TOKENS = torch.arange(12).reshape(3, 4)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    hidden, out = nn.Linear(64, 300, bias=False), nn.Linear(300, 50, bias=False)
    return nn.Sequential(nn.Embedding(50, 64), hidden, nn.ReLU(), out).eval()


def contents(name: str, modules: dict[str, Activation] | None = None) -> Contents:
    found = []
    for key, tensor in model().named_parameters():
        coded = Grouped(GRIDS[name]).encode(tensor.detach())
        found.append(Stored((key,), "parameter", coded, Decision(key, "grid", float(GRIDS[name].bits), "")))
    return Contents(tuple(found), modules or {}, {"pared": "0"})


def saved(contents: Contents, folder: Path) -> Path:
    (folder / "best_model.pt").write_bytes(storage.to_bytes(contents))
    return folder


def same(a: Contents, b: Contents) -> bool:
    return all(
        x.coded.format == y.coded.format
        and x.coded.parts.keys() == y.coded.parts.keys()
        and all(torch.equal(x.coded.parts[part], y.coded.parts[part]) for part in x.coded.parts)
        for x, y in zip(a.tensors, b.tensors, strict=True)
    )


@pytest.mark.parametrize("memory", ["fast", "small"])
@pytest.mark.parametrize("name", GRIDS)
def test_it_runs_on_what_it_decodes_to_and_is_kept_everywhere(
    name: str, memory: Literal["fast", "small"], tmp_path: Path
) -> None:
    ours = contents(name)
    floats = model()
    floats.load_state_dict({stored.name: stored.coded.decode() for stored in ours.tensors})
    quantized = pared.load(saved(ours, tmp_path), model=model(), memory=memory)
    expected = floats(TOKENS)
    assert torch.equal(quantized(TOKENS), expected)
    assert same(contents_of(quantized), ours)
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(other(TOKENS), expected)
        assert same(contents_of(other), ours)
    (tmp_path / "again").mkdir()
    quantized.save(tmp_path / "again")
    again = pared.load(tmp_path / "again", model=model(), memory=memory)
    assert torch.equal(again(TOKENS), expected)
    with open_records(tmp_path / "again" / "best_model.pt") as records:
        assert {entry.label for entry in parse_index(records).entries} == {GRIDS[name].label}


@pytest.mark.parametrize("name", GRIDS)
def test_a_state_dict_shows_all_parts_and_takes_them_back(name: str, tmp_path: Path) -> None:
    quantized = pared.load(saved(contents(name), tmp_path), model=model())
    state = {key: tensor.clone() for key, tensor in quantized.state_dict().items()}
    beside = {"weight" if part == "codes" else f"weight_{part.replace(' ', '_')}" for part in GRIDS[name].shapes(1, 1)}
    assert {key for key in state if key.startswith("1.")} == {f"1.{one}" for one in beside}
    assert state["1.weight"].dtype == torch.int8
    changed = {key: tensor.clone() for key, tensor in state.items()}
    changed["1.weight_step"] *= 2
    expected = quantized(TOKENS)
    quantized.load_state_dict(changed)
    assert not torch.equal(quantized(TOKENS), expected)
    assert all(torch.equal(tensor, changed[key]) for key, tensor in quantized.state_dict().items())
    quantized.load_state_dict(state)
    assert torch.equal(quantized(TOKENS), expected)
    assert all(torch.equal(tensor, state[key]) for key, tensor in quantized.state_dict().items())


def test_floats_and_row_steps_are_taken_too(tmp_path: Path) -> None:
    quantized = pared.load(saved(contents("Q4_K"), tmp_path), model=model())
    state = quantized.state_dict()
    floats = model().state_dict()
    quantized.load_state_dict(floats)
    assert torch.equal(quantized(TOKENS), model()(TOKENS))
    rows = Grid("int8").encode(floats["1.weight"], floats["1.weight"].abs().amax(1) / 127)
    own = {"1.weight": rows.parts["codes"], "1.weight_step": rows.parts["step"]}
    other = pared.load(tmp_path, model=model())
    missing = other.load_state_dict(own, strict=False).missing_keys
    assert "1.weight" not in missing
    assert torch.equal(dict(other.named_parameters())["1.weight"], rows.decode())
    with pytest.raises(RuntimeError, match="0.weight: expected int8 or int16 codes|0.weight: expected the codes of"):
        quantized.load_state_dict(state)  # its form is float32 now, which does not say what the groups are


@pytest.mark.parametrize("part", ["step", "multiple", "least"])
def test_other_groups_than_its_own_are_refused(part: str, tmp_path: Path) -> None:
    quantized = pared.load(saved(contents("Q4_K"), tmp_path), model=model())
    state = dict(quantized.state_dict())
    state[f"1.weight_{part}"] = state[f"1.weight_{part}"][:, :0]
    with pytest.raises(RuntimeError, match=r"1.weight: expected the codes of int4 g32, not torch.int8 with \['least'"):
        quantized.load_state_dict(state)


def test_a_weight_that_was_changed_is_no_longer_saved(tmp_path: Path) -> None:
    quantized = pared.load(saved(contents("Q4_K"), tmp_path), model=model())
    with torch.no_grad():
        quantized[1].weight[0, 0] += 1
    with pytest.raises(ModelError, match="was changed after it was compressed"):
        quantized.save(tmp_path / "again")


def test_groups_do_not_run_in_int8_and_the_report_says_so(tmp_path: Path) -> None:
    modules = {"1": Activation("dynamic")}
    path = saved(contents("Q4_0", modules), tmp_path)
    fast, small = pared.load(path, model=model()), pared.load(path, model=model(), memory="small")
    assert torch.equal(fast(TOKENS), small(TOKENS))
    assert "its steps belong to groups of columns" in str(fast.report(html=None))
    assert "but 3 whose steps belong to groups of columns are floats" in " ".join(str(small.report()).split())


def test_half_a_model(tmp_path: Path) -> None:
    """Weights of 16 bits: codes come back such that they decode to the same."""
    tensors = []
    for key, tensor in model().bfloat16().named_parameters():
        coded: Coded = Grouped(GRIDS["Q4_K"]).encode(tensor.detach())
        assert coded.decode().dtype == torch.bfloat16
        tensors.append(Stored((key,), "parameter", coded, Decision(key, "grid", 4.0, "")))
    quantized = pared.load(saved(Contents(tuple(tensors)), tmp_path), model=model().bfloat16())
    values: dict[str, Tensor] = {stored.name: stored.coded.decode() for stored in contents_of(quantized).tensors}
    assert all(torch.equal(values[one.name], one.coded.decode()) for one in tensors)


def test_expanded_and_compared_it_is_what_it_decodes_to(tmp_path: Path) -> None:
    ours = contents("Q6_K")
    path = saved(ours, tmp_path)
    pared.expand(path, tmp_path / "floats.safetensors")
    assert "weights   equal" in pared.compare(tmp_path / "floats.safetensors", path).render()
    assert "int6 g16" in pared.compare(model(), pared.load(path, model=model())).render()
    assert "int6 g16" in pared.inspect(path).render()


def test_a_model_with_groups_is_exported_by_torch(tmp_path: Path) -> None:
    quantized = pared.load(saved(contents("Q4_0"), tmp_path), model=model())
    program = torch.export.export(quantized, (TOKENS,))
    assert torch.equal(program.module()(TOKENS), quantized(TOKENS))


def test_decoding_is_captured() -> None:
    for name in ("Q4_0", "Q4_K", "int4 g128, zero"):
        coded = Grouped(GRIDS[name]).encode(torch.randn(8, 300))
        keys = list(coded.parts)

        class Decoder(nn.Module):
            def forward(self, parts: list[Tensor], *, keys: list[str] = keys, coded: Coded = coded) -> Tensor:
                found = dict(zip(keys, parts, strict=True))
                return Coded(coded.format, coded.shape, coded.dtype, found, coded.view).decode()

        program = torch.export.export(Decoder(), ([coded.parts[key] for key in keys],))
        assert torch.equal(program.module()([coded.parts[key] for key in keys]), coded.decode())
