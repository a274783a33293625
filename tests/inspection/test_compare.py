"""Two models compared: what is one tensor is found, and what differs is named."""

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import pared
from pared import Comparison, PostTrainingQuantConfig
from pared.readers.naming import bare
from tests.test_cli import run

State = dict[str, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))


def sharded(state: State, folder: Path) -> Path:
    """A Hugging Face folder of two shards."""
    folder.mkdir()
    names = sorted(state)
    placed: dict[str, str] = {}
    for i, part in enumerate((names[:3], names[3:]), 1):
        shard = f"model-{i:05}-of-00002.safetensors"
        safetensors.torch.save_file({name: state[name] for name in part}, folder / shard)
        placed |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "config.json").write_text("{}")
    return folder


def saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


def in_safetensors(state: State, path: Path) -> Path:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


FORMS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "model": lambda model, _: model,
    "state dict": lambda model, _: model.state_dict(),
    "pt": lambda model, folder: saved(model.state_dict(), folder / "a.pt"),
    "checkpoint": lambda model, folder: saved({"state_dict": model.state_dict(), "epoch": 3}, folder / "c.pt"),
    "parallel": lambda model, folder: saved(
        {f"module.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "p.pt"
    ),
    "compiled": lambda model, folder: in_safetensors(
        {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "o.safetensors"
    ),
    "wrapped": lambda model, folder: in_safetensors(
        {f"backbone.net.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "w.safetensors"
    ),
    "safetensors": lambda model, folder: in_safetensors(model.state_dict(), folder / "a.safetensors"),
    "sharded": lambda model, folder: sharded(model.state_dict(), folder / "sharded"),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_model_in_all_its_forms_is_equal_bit_for_bit(form: str, tmp_path: Path) -> None:
    model = network()
    other = FORMS[form](model, tmp_path)
    for a, b in ((model, other), (other, model)):
        found = pared.compare(a, b)
        assert found.identical == len(found.pairs) == 11
        assert found.alone == ()
        assert found.weights.same
        assert {pair.by for pair in found.pairs} == {"name"}


def damaged(state: State, name: str, noise: float = 0.1) -> State:
    return state | {name: state[name] + noise * torch.randn(state[name].shape)}


def test_the_tensor_that_differs_comes_first_and_has_its_figures(tmp_path: Path) -> None:
    state = network().state_dict()
    other = damaged(damaged(state, "3.weight"), "4.weight", 0.01)
    found = pared.compare(saved(state, tmp_path / "a.pt"), in_safetensors(other, tmp_path / "b.safetensors"))
    worst, second, *rest = found.pairs
    assert (worst.name, second.name) == ("3.weight", "4.weight")
    assert worst.similarity is not None
    difference = (other["3.weight"] - state["3.weight"]).double()
    signal = state["3.weight"].double().square().sum()
    assert worst.similarity.sqnr == pytest.approx(float(10 * torch.log10(signal / difference.square().sum())))
    assert worst.similarity.error == pytest.approx(float(difference.abs().max()))
    expected = torch.cosine_similarity(state["3.weight"].flatten().double(), other["3.weight"].flatten().double(), 0)
    assert worst.similarity.cosine == pytest.approx(float(expected))
    assert worst.nbytes == (4 * 64 * 64, 4 * 64 * 64)
    assert all(pair.identical for pair in rest)


@pytest.mark.parametrize("container", ["pt", "safetensors"])
@pytest.mark.parametrize("approach", ["weight_only", "dynamic"])
def test_an_artifact_and_its_source(container: str, approach: str, tmp_path: Path) -> None:
    model = network().eval()
    q = pared.fit(model, PostTrainingQuantConfig(approach=approach, quant_level=0), [torch.randn(16, 48)])
    path = pared.save(q, tmp_path / "q", container=container)
    source = in_safetensors(model.state_dict(), tmp_path / "a.safetensors")
    for b in (path, tmp_path / "q", q, saved(q.state_dict(), tmp_path / "state.pt")):
        found = pared.compare(source, b)
        assert len(found.pairs) == 11
        pairs = {pair.name: pair for pair in found.pairs}
        weight = pairs["3.weight"]
        assert weight.formats == ("float32", "grid int8")
        assert weight.similarity is not None
        decoded = pared.load(path, model=network())[3].weight.double()
        error = decoded - model[3].weight.detach().double()
        assert weight.similarity.noise == pytest.approx(float(error.square().sum()), rel=1e-9)
        assert weight.ratio < 0.3
        assert pairs["1.num_batches_tracked"].identical
    assert pared.compare(path, q).weights.same
    assert found.b.name == str(tmp_path / "state.pt")


def test_a_copy_in_bfloat16_is_alike_and_half_as_large(tmp_path: Path) -> None:
    model = network()
    halved = {name: t.bfloat16() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    found = pared.compare(model, in_safetensors(halved, tmp_path / "b.safetensors"))
    weight = next(pair for pair in found.pairs if pair.name == "0.weight")
    assert weight.formats == ("float32", "bfloat16")
    assert weight.ratio == 0.5
    assert weight.similarity is not None
    assert 45 < weight.similarity.sqnr < 60
    ones = next(pair for pair in found.pairs if pair.name == "1.weight")
    assert ones.similarity is not None
    assert ones.similarity.same
    assert not ones.identical
    assert found.equal > found.identical


def test_renamed_and_transposed_tensors_are_found_by_their_numbers() -> None:
    state = network().state_dict()
    names = {name: f"t{i}" for i, name in enumerate(reversed(list(state)))}
    renamed = {names[name]: tensor for name, tensor in state.items()}
    renamed[names["0.weight"]] = renamed[names["0.weight"]].T
    renamed[names["3.weight"]] = renamed[names["3.weight"]] + 1e-3 * torch.randn(64, 64)
    found = pared.compare(state, renamed)
    pairs = {pair.name: pair for pair in found.pairs}
    for name in ("0.weight", "0.bias", "3.weight", "3.bias", "4.weight", "4.bias", "1.num_batches_tracked"):
        assert pairs[name].names[1] == names[name]
        assert pairs[name].by == "content"
    assert pairs["0.weight"].similarity is not None
    assert pairs["0.weight"].similarity.same
    assert "transposed in B" in pairs["0.weight"].note
    assert f"matched by content: {names['3.weight']} in B" in found.render()


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda t: t.T.contiguous(), "transposed in B"),
        (lambda t: t.reshape(8, 8, -1), "reshaped in B"),
    ],
)
@pytest.mark.parametrize("name", ["3.weight", "4.weight"])
def test_a_tensor_laid_out_in_another_way_is_compared(change: Any, note: str, name: str) -> None:
    state = network().state_dict()
    if name == "4.weight" and note.startswith("reshaped"):
        change = lambda t: t.reshape(-1)  # noqa: E731  # 640 numbers
    found = pared.compare(state, state | {name: change(state[name])})
    pair = next(pair for pair in found.pairs if pair.name == name)
    assert pair.note == note
    assert pair.similarity is not None
    assert pair.similarity.same


def test_positions_do_not_count_as_weights() -> None:
    state = {"positions": torch.arange(10_000), "w": torch.randn(20, 20)}
    other = state | {"w": torch.zeros(20, 20)}
    assert pared.compare(state, other).weights.sqnr == pytest.approx(0)


def test_other_shapes_and_missing_tensors_are_rows(tmp_path: Path) -> None:
    state = network().state_dict()
    other = {name: tensor for name, tensor in state.items() if name != "0.bias"}
    other |= {"4.weight": torch.randn(12, 64), "extra": torch.randn(7, 9)}
    found = pared.compare(state, in_safetensors(other, tmp_path / "b.safetensors"))
    first = found.pairs[0]
    assert (first.name, first.similarity, first.shapes) == ("4.weight", None, ((10, 64), (12, 64)))
    assert [(one.name, one.side) for one in found.alone] == [("0.bias", "A"), ("extra", "B")]
    text = found.render()
    assert "shape [10, 64] in A, [12, 64] in B" in text
    assert "1 not comparable, 1 only in A, 1 only in B" in text


def test_a_tied_tensor_that_one_side_stores_once_is_explained() -> None:
    table = torch.randn(32, 8)
    found = pared.compare({"embed": table, "head": table}, {"embed": table.clone()})
    assert [(one.name, one.nbytes) for one in found.alone] == [("head", 0)]
    assert found.alone[0].note == "shares the numbers of embed, which both have"


def transposed(out: int, columns: int) -> nn.Module:
    """A layer whose output channels are its columns."""
    layer: nn.Module = Conv1D(out, columns)  # type: ignore[no-untyped-call]  # transformers
    return layer


@pytest.mark.parametrize("form", ["file", "in memory"])
def test_the_state_dict_of_a_quantized_model_is_compared_by_value(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(transposed(n, 48) for n in (48, 96)), nn.Linear(96, 96))  # squares of both kinds
    model.append(copy.deepcopy(model[2]))
    model[3].weight = model[2].weight
    q = pared.fit(model)
    state = q.state_dict() if form == "in memory" else saved(q.state_dict(), tmp_path / "q.pt")
    same = pared.compare(q, state)
    assert same.equal == len(same.pairs) == 8
    assert same.alone == ()
    for found in (pared.compare(model, state), pared.compare(state, model)):
        weights = [pair for pair in found.pairs if pair.name.endswith("weight")]
        assert all(pair.similarity is not None and pair.similarity.sqnr > 38 for pair in weights)
        assert {pair.formats for pair in weights} <= {("float32", "grid int8"), ("grid int8", "float32")}
        tied = next(pair for pair in weights if pair.name == "3.weight")
        assert tied.nbytes == (0, 0)


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*", "ignore:.*quantized.*")
def test_quantized_tensors_compare_where_scales_are_known(tmp_path: Path) -> None:
    weight = torch.randn(16, 16)
    q = torch.quantize_per_tensor(weight, 0.05, 0, torch.qint8)
    live = pared.compare({"w": weight}, {"w": q}).pairs[0]
    assert live.formats == ("float32", "qint8")
    assert live.similarity is not None
    assert live.similarity.error == pytest.approx(float((q.dequantize() - weight).abs().max()))
    path = saved({"w": q}, tmp_path / "q.pt")
    (unknown,) = pared.compare({"w": weight}, path).pairs
    assert unknown.similarity is None
    assert "whose scales are not read" in unknown.note
    (same,) = pared.compare(path, path).pairs
    assert same.identical


def test_a_type_without_numbers_is_told() -> None:
    pairs = torch.zeros(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    (pair,) = pared.compare({"w": pairs}, {"w": pairs}).pairs
    assert pair.similarity is None
    assert "float4_e2m1fn_x2: numbers in blocks, which are not read" in pair.note


def test_json_is_valid_and_has_every_fact(tmp_path: Path) -> None:
    state = network().state_dict()
    other = state | {"3.weight": torch.zeros(64, 64), "4.bias": torch.full((10,), math.nan), "extra": torch.ones(2, 3)}
    found = pared.compare(state, other).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["4.bias"]["sqnr"] == "-inf"
    assert rows["3.weight"]["sqnr"] == 0
    assert rows["3.weight"]["cosine"] == "nan"
    assert rows["0.weight"]["sqnr"] == "inf"
    assert rows["0.weight"]["equal"] is True
    assert len(found["rows"]) == 11
    assert [one["name"] for one in found["only_in_b"]] == ["extra"]


@pytest.mark.parametrize(
    ("a", "b", "row", "words"),
    [
        ([0, 0], [0, 0.5], "-inf 5.0e-01 A is 0", "SQNR -inf dB, no cosine (A is 0), largest error 0.5"),
        ([1, 1], [0, 0], "0.0 1.0e+00 B is 0", "SQNR 0.0 dB, no cosine (B is 0), largest error 1 (1 of"),
        ([1, 1, 1, 1], [2, 2, 2, 2], "0.0 1.0e+00 0.0e+00", "SQNR 0.0 dB, 1 - cosine 0.0e+00, largest error 1 (1 of"),
        ([1, 1], [math.nan, 1], "-inf inf not finite", "1 of 2 numbers are NaN or infinite in A or B, and not alike"),
        ([1e200, 1e200], [1, 1], "too large 1.0e+200 too large", "SQNR too large, no cosine (too large)"),
    ],
)
def test_what_has_no_ratio_or_angle_is_told_in_words(a: list[float], b: list[float], row: str, words: str) -> None:
    text = pared.compare(*({"w": torch.tensor(one, dtype=torch.float64)} for one in (a, b))).render()
    assert f"weights   {words}" in text
    (line,) = (line for line in text.splitlines() if line.startswith(" w "))
    assert " ".join(line.split()).endswith(f" {row}")


@pytest.mark.parametrize("rows", [0, 3])
def test_without_numbers_nothing_is_equal(rows: int) -> None:
    found = pared.compare({"w": torch.ones(rows, 4)}, {"w": torch.ones(rows, 4 if rows == 0 else 5)})
    assert "weights   nothing could be compared" in found.render()


def test_text_is_100_columns_wide_and_as_long_as_asked_for() -> None:
    torch.manual_seed(0)
    state = {f"encoder.layers.{i}.a_rather_long_name.weight": torch.randn(300, 300) for i in range(40)}
    other = {name: tensor + 1e-3 * torch.randn(300, 300) for name, tensor in state.items()}
    found = pared.compare(state, other)
    text = found.render(most=5)
    assert max(map(len, text.splitlines())) <= 100
    assert "and 35 more tensors" in text
    assert text.count("float32") == 5
    hostile = pared.compare({"a\x1b[31m": torch.ones(3)}, {"a\x1b[31m": torch.zeros(3)}).render()
    assert "\x1b" not in hostile


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (3, network(), pared.ConfigError, "compare: A: expected a path, a torch.nn.Module or a state dict, got int"),
        (network(), {}, pared.ConfigError, "compare: B: expected a path"),
        ({"a": torch.ones(20)}, {"b": torch.ones(3), "c": torch.ones(4)}, pared.MismatchError, "no tensor in common"),
        ("nowhere.pt", network(), pared.FileError, "nowhere.pt"),
    ],
)
def test_nonsense_is_refused(a: Any, b: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pared.compare(a, b)


def test_what_has_nothing_in_common_says_what_names_look_like() -> None:
    with pytest.raises(pared.MismatchError, match=r"A has 'a'; B has 'b', 'c' and 1 more"):
        pared.compare({"a": torch.ones(20)}, {n: torch.ones(3) for n in "bcd"})


def test_inputs_need_models() -> None:
    with pytest.raises(pared.ConfigError, match="inputs are given, but one of the two is not a torch.nn.Module"):
        pared.compare(network(), network().state_dict(), inputs=[torch.ones(1, 48)])


def test_a_model_is_equal_to_itself() -> None:
    model = network()
    found = pared.compare(model, model)
    assert found.identical == 11
    assert "equal" in str(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.encoder.weight", "encoder.weight"),
        ("model_state_dict/module.a.b", "a.b"),
        ("a._orig_mod.model.b", "a.model.b"),
        ("weight", "weight"),
        ("model", "model"),
    ],
)
def test_bare_names(name: str, expected: str) -> None:
    assert bare(name) == expected


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = network().state_dict()
    paths = [saved(one, tmp_path / f"{i}.pt") for i, one in enumerate((state, damaged(state, "3.weight")))]
    assert run(monkeypatch, "compare", *map(str, paths), "--most", "1") == 0
    shown = capsys.readouterr().out
    assert "3.weight" in shown
    assert "10 of them equal bit for bit" in shown
    assert run(monkeypatch, "compare", *map(str, paths), "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["name"] == "3.weight"
    assert run(monkeypatch, "compare", str(paths[0]), str(tmp_path / "none.pt")) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.child
def test_comparing_files_imports_no_torch(tmp_path: Path) -> None:
    model = network()
    pared.save(pared.fit(model), tmp_path)
    in_safetensors(model.state_dict(), tmp_path / "a.safetensors")
    code = (
        "import sys, pared\nfound = pared.compare(sys.argv[1], sys.argv[2])\n"
        "assert found.pairs and found.to_json() and str(found)\nassert 'torch' not in sys.modules\n"
    )
    arguments = [str(tmp_path / "a.safetensors"), str(tmp_path / "best_model.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_models_are_left_as_they_were() -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    found: Comparison = pared.compare(model, pared.fit(model))
    assert found.pairs
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
