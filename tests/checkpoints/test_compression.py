"""`pared compress` and `pared expand`: checkpoints in, artifacts out, floats back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import pared
from pared.artifact.envelope import open_records
from pared.artifact.index import Entry
from pared.artifact.parse import parse_index
from pared.checkpoints import expand
from pared.cli import app
from pared.model import storage
from tests.checkpoints.states import drawn, layers, saved, there_and_back
from tests.ratios import snr


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
