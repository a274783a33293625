"""`pared compress` and `pared expand`: checkpoints in, artifacts out, floats back."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import pared
from pared import readers
from pared.artifact.envelope import open_records
from pared.artifact.index import Entry
from pared.artifact.parse import parse_index
from pared.checkpoints import compress, expand
from pared.checkpoints.journal import FOLDER, Journal
from pared.checkpoints.sampling import predict_nbytes
from pared.cli import app
from pared.errors import ConfigError, CorruptError, FileError, MismatchError, ModelError, UnsafeError
from pared.model import storage
from tests.ratios import snr

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


# --- what becomes of single tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("bits", "least"), [(2, 7), (4, 19), (8, 38), (12, 65), (16, 65)])
def test_weights_come_back_in_their_own_type(dtype: torch.dtype, bits: float, least: float, tmp_path: Path) -> None:
    source = drawn(128, 300).to(dtype)
    found = there_and_back({"w": source}, tmp_path, bits=bits)["w"]
    assert found.dtype == dtype
    assert snr(source, found) > (min(least, 52) if dtype == torch.bfloat16 else least)


@pytest.mark.parametrize("bits", [1, 3, 4, 5.5, 8, 10])
def test_a_weight_takes_the_bits_that_were_asked_for(bits: float, tmp_path: Path) -> None:
    source = drawn(500, 400)
    path = pared.compress(saved({"w": source}, tmp_path / "m.pt"), tmp_path / "out", bits=bits)
    with open_records(path) as records:
        (entry,) = parse_index(records).entries
    rate = 8 * entry.nbytes / source.numel()
    assert rate < 8 if bits == 8 else bits - 0.03 < rate < bits + 0.01
    assert entry.bits == bits


def test_eight_bits_are_those_of_fit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(70, 50), nn.Linear(50, 30))
    path = pared.compress(saved(model.state_dict(), tmp_path / "m.pt"), tmp_path / "out")
    ours = storage.read(path).tensors
    fitted = pared.fit(model, quiet=True)
    theirs = storage.read(pared.save(fitted, tmp_path / "fitted")).tensors
    assert [stored.names for stored in ours] == [stored.names for stored in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.coded.format == b.coded.format
        assert all(torch.equal(a.coded.parts[key], b.coded.parts[key]) for key in b.coded.parts)


@pytest.mark.parametrize(
    "source",
    [
        torch.arange(7),
        torch.tensor(5),
        torch.tensor([[True, False]]),
        torch.tensor(2.5),
        torch.tensor(1e-30),
        torch.tensor([1e-9, 1.0], dtype=torch.float64),
        torch.tensor([0.5, -2.0], dtype=torch.float64),
        torch.tensor([1e300, 2.0], dtype=torch.float64),
        torch.zeros(0, 4),
        torch.zeros(3, 0),
        torch.zeros(5, 6),
        torch.full((4, 4), float("-inf")).triu(1),
        torch.tensor([[1e300, 1.0], [2.0, 3.0]], dtype=torch.float64),
        torch.tensor([1 + 2j, 3j]),
        torch.randn(6, 1, generator=torch.Generator().manual_seed(0)).half().float(),
        torch.tensor([1.0, 1e-3], dtype=torch.bfloat16),
        torch.ones(3, 200) * torch.tensor([[1e-38], [1.0], [3e38]]),
    ],
    ids=str,
)
def test_what_no_grid_is_for_comes_back_exactly(source: Tensor, tmp_path: Path) -> None:
    found = there_and_back({"t": source, "other": torch.ones(1)}, tmp_path)["t"]
    assert found.dtype == source.dtype
    assert torch.equal(found, source)


def test_rows_of_very_different_size_each_keep_their_digits(tmp_path: Path) -> None:
    source = drawn(8, 500) * 10.0 ** torch.arange(-30, 34, 8)[:, None]
    found = there_and_back({"w": source}, tmp_path)["w"]
    for row, back in zip(source, found, strict=True):
        assert snr(row, back) > 38


def test_short_rows_share_a_step(tmp_path: Path) -> None:
    source = drawn(4000, 3)
    found = there_and_back({"w": source}, tmp_path)["w"]
    assert (found - source).abs().max() <= source.abs().max() / 254 * 1.001


def test_fake_quantized_weights_come_back_exactly_and_small(tmp_path: Path) -> None:
    weight = drawn(300, 400)
    step = weight.abs().amax(1, keepdim=True) / 7
    source = (weight / step).round() * step
    found = there_and_back({"w": source}, tmp_path)
    assert torch.equal(found["w"], source)
    assert (tmp_path / "small" / "best_model.pt").stat().st_size < source.nbytes / 8


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    bits=st.sampled_from([1.5, 4, 8, 11]),
    scale=st.floats(-10, 10),
    seed=st.integers(0, 999),
)
@pytest.mark.slow
def test_any_shape_and_scale(
    shape: list[int],
    dtype: torch.dtype,
    bits: float,
    scale: float,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    source = (drawn(*shape, seed=seed) * 2.0**scale).to(dtype)
    state = {"t": source, "another": torch.ones(1)}  # a model without numbers is refused
    found = there_and_back(state, tmp_path_factory.mktemp("any"), bits=bits)["t"]
    assert found.dtype == dtype
    assert found.shape == source.shape
    assert bool(found.isfinite().all()) == bool(source.isfinite().all())
    if bits >= 8 and source.numel():
        assert (found - source).abs().max() <= source.abs().max() / 120


# --- damage


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damage_is_told(value: float, tmp_path: Path) -> None:
    source = drawn(30, 20)
    source[3, 7] = value
    with pytest.raises(ModelError) as error:
        pared.compress(saved({"fine": torch.ones(1), "layer.w": source}, tmp_path / "m.pt"), tmp_path / "out")
    what = "NaN" if value != value else "an infinity"
    assert str(error.value) == (
        f"layer.w: holds {what} (1 of 600 numbers are not finite, the first at [3, 7])\n"
        "  Repair the checkpoint or fetch it again: a compressed model cannot be better than its source."
    )
    assert not (tmp_path / "out" / "best_model.pt").exists()


def test_a_type_without_a_word_is_told(tmp_path: Path) -> None:
    state = {"w": drawn(4, 4).to(torch.float8_e4m3fn)}
    with pytest.raises(ConfigError, match="w: is of type float8_e4m3fn, which an artifact cannot hold"):
        pared.compress(saved(state, tmp_path / "m.pt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- models


class Tied(nn.Module):
    """Two names for one weight, and a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 60, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.embedding(x))) * self.scale
        return y


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "epoch": 1},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    ],
)
def test_a_model_runs_on_what_was_compressed(wrap: Callable[[State], object], tmp_path: Path) -> None:
    model = Tied().eval()
    path = pared.compress(saved(wrap(model.state_dict()), tmp_path / "m.pt"), tmp_path / "out")
    small = pared.load(path.parent, model=Tied())
    x = torch.arange(60)
    assert snr(model(x), small(x)) > 35
    assert small.head.weight is small.embedding.weight
    assert pared.inspect(tmp_path / "out").original_nbytes == sum(t.nbytes for t in Tied().parameters()) + 2 * 64 + 8
    again = pared.load(pared.save(small, tmp_path / "again"), model=Tied())
    assert torch.equal(again(x), small(x))


def test_a_checkpoint_without_the_second_name_fits_a_tied_model(tmp_path: Path) -> None:
    model = Tied().eval()
    state = {name: value for name, value in model.state_dict().items() if name != "head.weight"}
    small = pared.load(pared.compress(saved(state, tmp_path / "m.pt"), tmp_path / "out"), model=Tied())
    assert snr(model(torch.arange(60)), small(torch.arange(60))) > 35
    missing = {name: value for name, value in state.items() if name != "norm.weight"}
    path = pared.compress(saved(missing, tmp_path / "m.pt"), tmp_path / "out")
    with pytest.raises(MismatchError, match="the artifact lacks norm.weight"):
        pared.load(path, model=Tied())


def test_tied_weights_expand_under_both_names(tmp_path: Path) -> None:
    model = Tied()
    found = there_and_back(model.state_dict(), tmp_path)
    assert torch.equal(found["head.weight"], found["embedding.weight"])
    model.load_state_dict(found)
    done = expand.run(tmp_path / "small", tmp_path / "again.safetensors", quiet=True)
    assert done.tied == ("head.weight",)
    assert "tied: head.weight stored again, 3,840 bytes" in str(done)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_what_fit_made_expands_to_the_weights_that_it_runs_on(kind: str, tmp_path: Path) -> None:
    conf = pared.PostTrainingQuantConfig(rules=[pared.Rule("1", bits=4), pared.Rule("2", keep=True)])
    fitted = pared.fit(nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 60), nn.Conv1d(60, 3, 2)), conf, quiet=True)
    path = pared.save(fitted, tmp_path / "fitted", container=kind)
    found = safetensors.torch.load_file(pared.expand(path, tmp_path / "out"))
    contents = storage.read(path)
    assert set(found) == {name for stored in contents.tensors for name in stored.names}
    assert all(torch.equal(found[stored.name], stored.coded.decode()) for stored in contents.tensors)


# --- folders of Hugging Face


def frozen(model: Any) -> Any:
    """A model of transformers, whose methods have no types, ready to be called."""
    return model.requires_grad_(False).eval()


def bert() -> Any:
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=500)
    )
    return frozen(model)


@pytest.mark.slow
def test_a_sharded_folder_there_and_back(tmp_path: Path) -> None:
    model, x = bert(), torch.arange(20)[None]
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "1_Pooling").mkdir()
    (tmp_path / "hf" / "1_Pooling" / "config.json").write_text("{}")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    done = compress.run(tmp_path / "hf", tmp_path / "small", quiet=True)
    assert done.copied == ("config.json", "tokenizer.json", "1_Pooling/config.json")
    files = sorted(path.name for path in (tmp_path / "small").iterdir())
    assert files == ["1_Pooling", "best_model.pt", "config.json", "tokenizer.json"]
    empty: Any = AutoModel.from_config(BertConfig.from_pretrained(tmp_path / "small"))  # type: ignore[no-untyped-call]  # theirs
    small = pared.load(tmp_path / "small", model=empty)
    with torch.no_grad():
        expected, found = model(x).last_hidden_state, small(x).last_hidden_state
    assert snr(expected, found) > 30
    pared.expand(tmp_path / "small", tmp_path / "big")
    again = frozen(AutoModel.from_pretrained(tmp_path / "big"))
    with torch.no_grad():
        assert torch.allclose(again(x).last_hidden_state, found, atol=1e-5)


def test_a_tied_language_model_of_hugging_face(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100, n_positions=16)
    model, x = frozen(GPT2LMHeadModel(config)), torch.arange(10)[None]
    model.save_pretrained(tmp_path / "hf")
    pared.compress(tmp_path / "hf", tmp_path / "small")
    small = pared.load(tmp_path / "small", model=GPT2LMHeadModel(config))
    pared.expand(tmp_path / "small", tmp_path / "big")
    again = frozen(GPT2LMHeadModel.from_pretrained(tmp_path / "big"))
    with torch.no_grad():
        assert snr(model(x).logits, small(x).logits) > 30
        assert torch.allclose(again(x).logits, small(x).logits, atol=1e-5)


def test_the_output_may_be_within_the_source(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "hf")
    pared.compress(tmp_path / "hf", tmp_path / "hf" / "small")
    first = (tmp_path / "hf" / "small" / "best_model.pt").read_bytes()
    pared.compress(tmp_path / "hf", tmp_path / "hf" / "small")
    assert (tmp_path / "hf" / "small" / "best_model.pt").read_bytes() == first
    assert sorted(path.name for path in (tmp_path / "hf" / "small").iterdir()) == ["best_model.pt", "config.json"]


# --- sizes


def layers() -> State:
    return {f"{i}.weight": drawn(80 + 40 * i, 200, seed=i) * 4.0**-i for i in range(6)}


@pytest.mark.parametrize("share", [0.05, 0.1, 0.125, 0.2, 0.3])
@pytest.mark.slow
def test_a_size_is_kept_and_used(share: float, tmp_path: Path) -> None:
    source = saved(layers(), tmp_path / "m.pt")
    size = int(share * source.stat().st_size)
    found = pared.compress(source, tmp_path / "out", max_size=size).stat().st_size
    assert size - 4096 < found <= size


def test_a_size_is_spent_where_it_counts(tmp_path: Path) -> None:
    """The errors are the same share of energy for each weight of every tensor: large tensors bear more of them."""
    source = layers()
    found = there_and_back(source, tmp_path, max_size="60KB")
    shares = [10 ** (-snr(source[name], found[name]) / 10) / source[name].numel() for name in source]
    assert max(shares) < 1.2 * min(shares)


def test_a_size_with_a_unit(tmp_path: Path) -> None:
    source = saved(layers(), tmp_path / "m.pt")
    assert pared.compress(source, tmp_path / "out", max_size="100KiB").stat().st_size <= 102_400


def test_an_impossible_size_says_which_is_possible(tmp_path: Path) -> None:
    source = saved(layers(), tmp_path / "m.pt")
    with pytest.raises(ConfigError, match=r"max_size: 1,000 bytes are too few: with all weights at zero"):
        pared.compress(source, tmp_path / "out", max_size=1000)


@pytest.mark.parametrize("bits", [3, 4, 8, 12, 16])
def test_what_is_predicted_is_what_it_takes(bits: float, tmp_path: Path) -> None:
    state = layers() | {"large": drawn(900, 1000), "bias": drawn(500), "n": torch.arange(9)}
    source = saved(state, tmp_path / "m.pt")
    with readers.open_listing(source) as listing:
        predicted = predict_nbytes(listing, bits)
    taken = pared.compress(source, tmp_path / "out", bits=bits).stat().st_size
    assert abs(predicted / taken - 1) < 0.03


# --- options and places


@pytest.mark.parametrize("bits", [0, -1, 15.5 + 1, "8", True, float("nan")])
def test_rates_that_make_no_sense(bits: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compress: bits=.* is not a valid rate"):
        pared.compress(tmp_path / "m.pt", tmp_path, bits=bits)


def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        pared.compress(tmp_path / "m.pt", tmp_path, bits=4, max_size=1000)


def test_artifacts_are_compressed_already(tmp_path: Path) -> None:
    path = pared.compress(saved({"w": drawn(4, 4)}, tmp_path / "m.pt"), tmp_path / "out")
    for source in (path, path.parent):
        with pytest.raises(ConfigError, match="is compressed already"):
            pared.compress(source, tmp_path / "other")


def test_the_source_is_not_written_over(tmp_path: Path) -> None:
    source = saved({"w": drawn(4, 4)}, tmp_path / "best_model.pt")
    with pytest.raises(ConfigError, match="is the source itself"):
        pared.compress(source, tmp_path)
    path = pared.compress(source, tmp_path / "out").rename(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="is the artifact itself"):
        pared.expand(path, path)


def test_a_file_without_a_model(tmp_path: Path) -> None:
    source = saved({"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, tmp_path / "m.pt")
    with pytest.raises(FileError, match="holds no weights of a model"):
        pared.compress(source, tmp_path / "out")


@pytest.mark.parametrize("state", [{}, {"w": torch.zeros(0, 8)}, {"model": {}}], ids=str)
def test_an_empty_state_is_refused(state: Any, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="holds no weights of a model"):
        pared.compress(saved(state, tmp_path / "m.pt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_meet_are_told(tmp_path: Path) -> None:
    source = saved({"a": {"b.c": torch.ones(1)}, "a.b": {"c": torch.ones(1)}}, tmp_path / "m.pt")
    with pytest.raises(FileError, match=r"has 2 tensors that a model would know by the name 'a\.b\.c'"):
        pared.compress(source, tmp_path / "out")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    source = saved({"w": drawn(4, 4)}, tmp_path / "m.pt")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError, match="cannot be written"):
        pared.compress(source, tmp_path / "file" / "out")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(layers(), tmp_path / "m.pt")
    old = pared.compress(source, tmp_path / "out", bits=3).read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pared.checkpoints.journal._write", full)
        with pytest.raises(FileError, match="cannot be written: No space left on device"):
            pared.compress(source, tmp_path / "out", bits=5)
    with monkeypatch.context() as patch:
        patch.setattr("pared.checkpoints.compress.write_torch", full)
        with pytest.raises(FileError, match="cannot be written: No space left on device"):
            pared.compress(source, tmp_path / "out", bits=5)
    assert (tmp_path / "out" / "best_model.pt").read_bytes() == old
    with monkeypatch.context() as patch:
        patch.setattr("pared.checkpoints.expand.decode", full)
        with pytest.raises(FileError):
            pared.expand(tmp_path / "out", tmp_path / "big")
    assert list((tmp_path / "big").iterdir()) == []


# --- a killed run

_CHILD = """
import os, signal, sys
from pared.checkpoints import compress, journal
left = int(sys.argv[3])
write = journal._write
def dying(file, piece):
    global left
    left -= 1
    if left < 0:
        write(file, bytes(memoryview(piece).cast("B")[:len(piece) // 2]))  # a part of it
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, piece)
journal._write = dying
compress.compress(sys.argv[1], sys.argv[2], **eval(sys.argv[4]))
"""


@pytest.mark.parametrize("writes", [0, 4, 7, 10, 11])
@pytest.mark.parametrize("options", [{"bits": 4.0}, {"max_size": 60_000}], ids=str)
@pytest.mark.child
def test_a_killed_run_goes_on(writes: int, options: dict[str, Any], tmp_path: Path) -> None:
    source = saved(layers(), tmp_path / "m.pt")
    whole = pared.compress(source, tmp_path / "whole", **options).read_bytes()
    arguments = [str(source), str(tmp_path / "out"), str(writes), repr(options)]
    child = subprocess.run([sys.executable, "-c", _CHILD, *arguments], check=False)
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "best_model.pt").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FOLDER]
    done = compress.run(source, tmp_path / "out", **options, quiet=True)
    assert done.path.read_bytes() == whole
    assert (done.resumed > 0) == (writes >= 5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["best_model.pt"]


def interrupted(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A run that ends after its last tensor."""
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pared.compress(source, output, **options)


def test_other_work_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = saved(layers(), tmp_path / "m.pt"), tmp_path / "out"
    interrupted(source, output, monkeypatch)
    assert compress.run(source, output, quiet=True).resumed == 6
    interrupted(source, output, monkeypatch)
    assert compress.run(source, output, bits=4, quiet=True).resumed == 0
    interrupted(source, output, monkeypatch)
    saved(layers(), source)
    os.utime(source, ns=(1, 1))
    assert compress.run(source, output, quiet=True).resumed == 0


@pytest.mark.parametrize("place", ["journal.jsonl", "data"])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.99])
def test_a_damaged_journal_is_not_believed(
    place: str, where: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = saved(layers(), tmp_path / "m.pt"), tmp_path / "out"
    whole = pared.compress(source, tmp_path / "whole").read_bytes()
    interrupted(source, output, monkeypatch)
    file = output / FOLDER / place
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 0xFF
    file.write_bytes(content)
    done = compress.run(source, output, quiet=True)
    assert done.path.read_bytes() == whole
    assert done.resumed < 6


PLANS: tuple[Any, ...] = (3, [], {}, {"round": 1}, {"round": "1", "level": 1.0}, {"round": 1, "level": 1e300})


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_plan_that_makes_no_sense_is_made_again(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = saved(layers(), tmp_path / "m.pt"), tmp_path / "out"
    whole = pared.compress(source, tmp_path / "whole", max_size=60_000).read_bytes()
    interrupted(source, output, monkeypatch, max_size=60_000)
    head, *lines = (output / FOLDER / "journal.jsonl").read_bytes().splitlines(keepends=True)
    head = json.dumps(json.loads(head) | {"plan": plan}).encode() + b"\n"
    (output / FOLDER / "journal.jsonl").write_bytes(b"".join([head, *lines]))
    assert pared.compress(source, output, max_size=60_000).read_bytes() == whole


def test_a_journal_of_other_tensors_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = saved(layers(), tmp_path / "m.pt"), tmp_path / "out"
    whole = pared.compress(source, tmp_path / "whole").read_bytes()
    interrupted(source, output, monkeypatch)
    head, first, *_ = (output / FOLDER / "journal.jsonl").read_bytes().splitlines(keepends=True)
    first = json.dumps(json.loads(first) | {"name": "other"}).encode() + b"\n"
    (output / FOLDER / "journal.jsonl").write_bytes(head + first)
    assert pared.compress(source, output).read_bytes() == whole


def test_two_runs_do_not_write_to_one_place(tmp_path: Path) -> None:
    source = saved(layers(), tmp_path / "m.pt")
    with Journal(tmp_path / "out", {}), pytest.raises(FileError, match="out: another run writes to this directory"):
        pared.compress(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    pared.compress(source, tmp_path / "out")


# --- the command line, and what is not imported


def test_the_commands_say_what_they_did(tmp_path: Path) -> None:
    state = {"model": layers(), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}, 1: {"exp_avg": torch.ones(5)}}}}
    source = saved(state, tmp_path / "m.pt")
    runner = CliRunner()
    found = runner.invoke(app, ["compress", str(source), "-o", str(tmp_path / "out"), "--bits", "4"])
    lines = found.output.splitlines()
    assert lines[0] == (
        "left out: optimizer/state/0/exp_avg and 1 more, 32 bytes: the state of an optimizer, which only training needs"
    )
    assert lines[-1].startswith(f"{source.stat().st_size:,} -> ")
    found = runner.invoke(app, ["expand", str(tmp_path / "out"), "-o", str(tmp_path / "big.safetensors")])
    assert found.output.strip().endswith(str(tmp_path / "big.safetensors"))
    assert runner.invoke(app, ["compress", str(source), "-o", str(tmp_path / "q"), "-q"]).output == ""


def test_names_do_not_steer_the_terminal(tmp_path: Path) -> None:
    state = {"model": {"w": drawn(4, 4), "v\x1b[2J": drawn(4, 4)}, "optimizer\x1b[31m": {"m": torch.ones(3)}}
    source = saved(state, tmp_path / "m.pt")
    runner = CliRunner()
    found = runner.invoke(app, ["compress", str(source), "-o", str(tmp_path / "out")])
    assert r"left out: optimizer\x1b[31m/m, 12 bytes" in found.output
    assert "\x1b" not in found.output


@pytest.mark.child
def test_torch_is_not_imported(tmp_path: Path) -> None:
    source = saved(layers(), tmp_path / "m.pt")
    code = (
        "import sys; from pared.cli import app\n"
        f"import pared; pared.compress({str(source)!r}, {str(tmp_path / 'out')!r})\n"
        f"pared.expand({str(tmp_path / 'out')!r}, {str(tmp_path / 'big')!r}); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_a_damaged_artifact_does_not_expand(tmp_path: Path) -> None:
    path = pared.compress(saved({"w": drawn(90, 90)}, tmp_path / "m.pt"), tmp_path / "out")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="checksum"):
        pared.expand(path, tmp_path / "big.safetensors")
    assert not (tmp_path / "big.safetensors").exists()


def test_many_small_tensors_are_divided_into_batches_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"w{i:03d}": torch.full((2, 3), float(i)) for i in range(200)}
    asked: list[str] = []

    def need(entry: Entry) -> int:
        asked.append(entry.name)
        return 64

    monkeypatch.setattr(expand, "need", need)
    monkeypatch.setattr(expand, "_BATCH", 64 * 7)
    assert all(torch.equal(value, state[name]) for name, value in there_and_back(state, tmp_path).items())
    assert len(asked) <= 3 * len(state)


def test_a_name_that_the_format_keeps_for_itself_is_told(tmp_path: Path) -> None:
    path = pared.compress(saved({"__metadata__": drawn(4, 4)}, tmp_path / "m.pt"), tmp_path / "out")
    with pytest.raises(ConfigError, match="__metadata__: is a name that is reserved in .safetensors files"):
        pared.expand(path, tmp_path / "big.safetensors")


@pytest.mark.parametrize("scale", [1e36, 1e-30])
def test_very_large_and_very_small_numbers_fit_a_size(scale: float, tmp_path: Path) -> None:
    source = {"few rows": drawn(8, 3000) * scale, "rows": drawn(40, 300) * scale}
    for size in (4500, 30_000):
        found = there_and_back(source, tmp_path, max_size=size)
        for name, tensor in source.items():
            assert snr(tensor / scale, found[name] / scale) > (0 if size == 4500 else 33)


def test_complex128_is_told(tmp_path: Path) -> None:
    path = pared.compress(saved({"z": torch.ones(2, dtype=torch.complex128)}, tmp_path / "m.pt"), tmp_path / "out")
    with pytest.raises(ConfigError, match="is of type complex128, which .safetensors files do not have"):
        pared.expand(path, tmp_path / "big.safetensors")


def test_nothing_of_the_machine_is_in_the_file(tmp_path: Path) -> None:
    first = pared.compress(saved(layers(), tmp_path / "m.pt"), tmp_path / "one").read_bytes()
    second = pared.compress(saved(layers(), tmp_path / "other.pt"), tmp_path / "two").read_bytes()
    assert first == second
    with open_records(first) as records:
        provenance = parse_index(records).provenance
    assert json.dumps(provenance) == json.dumps({"compress": {"bits": 8.0}, "pared": pared.__version__})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpy_archives(save: Callable[..., None], tmp_path: Path) -> None:
    source = np.asfortranarray(drawn(30, 40).numpy())
    save(tmp_path / "m.npz", w=source)
    (stored,) = storage.read(pared.compress(tmp_path / "m.npz", tmp_path / "out")).tensors
    assert stored.names == ("w",)
    assert snr(torch.from_numpy(source), stored.coded.decode()) > 38


def test_pickled_modules(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8))
    path = pared.compress(saved({"model": model, "epoch": 3}, tmp_path / "m.pt"), tmp_path / "out")
    small = pared.load(path, model=model)
    assert set(model.state_dict()) == {name for stored in storage.read(path).tensors for name in stored.names}
    assert snr(model(torch.ones(1, 8))[0], small(torch.ones(1, 8))[0]) > 25


def test_of_several_models_one_has_to_be_named(tmp_path: Path) -> None:
    for name in ("unet", "vae"):
        (tmp_path / "both" / name).mkdir(parents=True)
        saved({"w": drawn(4, 4)}, tmp_path / "both" / name / "weights.pt")
    with pytest.raises(FileError, match=r"holds several models: unet/weights\.pt, vae/weights\.pt"):
        pared.compress(tmp_path / "both", tmp_path / "out")
    pared.compress(tmp_path / "both" / "unet", tmp_path / "out")


def test_a_tensor_that_repeats_itself_without_end(tmp_path: Path) -> None:
    source = saved({"w": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "m.pt")
    with pytest.raises(UnsafeError, match=r"w: repeats 4 bytes until they are 4,398,046,511,104"):
        pared.compress(source, tmp_path / "out")
