"""What cannot be compressed or expanded is refused with its name, and nothing is left behind."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import pared
from pared.errors import ConfigError, CorruptError, FileError, ModelError, UnsafeError
from tests.checkpoints.states import drawn, layers, saved


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


def test_a_damaged_artifact_does_not_expand(tmp_path: Path) -> None:
    path = pared.compress(saved({"w": drawn(90, 90)}, tmp_path / "m.pt"), tmp_path / "out")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="checksum"):
        pared.expand(path, tmp_path / "big.safetensors")
    assert not (tmp_path / "big.safetensors").exists()


def test_a_name_that_the_format_keeps_for_itself_is_told(tmp_path: Path) -> None:
    path = pared.compress(saved({"__metadata__": drawn(4, 4)}, tmp_path / "m.pt"), tmp_path / "out")
    with pytest.raises(ConfigError, match="__metadata__: is a name that is reserved in .safetensors files"):
        pared.expand(path, tmp_path / "big.safetensors")


def test_complex128_is_told(tmp_path: Path) -> None:
    path = pared.compress(saved({"z": torch.ones(2, dtype=torch.complex128)}, tmp_path / "m.pt"), tmp_path / "out")
    with pytest.raises(ConfigError, match="is of type complex128, which .safetensors files do not have"):
        pared.expand(path, tmp_path / "big.safetensors")


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


@pytest.mark.parametrize("existing", ["the source", "something else", "nothing at all"])
@pytest.mark.parametrize("into", ["folder", "file"])
def test_a_file_that_expand_did_not_write_is_not_replaced(existing: str, into: str, tmp_path: Path) -> None:
    source = tmp_path / "source" / "model.safetensors"
    source.parent.mkdir()
    safetensors.torch.save_file(layers(), source)
    small = pared.compress(source.parent, tmp_path / "small")
    exact = {"the source": source.read_bytes(), "something else": b"words", "nothing at all": b""}[existing]
    source.write_bytes(exact)
    with pytest.raises(FileError) as error:
        pared.expand(small, source if into == "file" else source.parent)
    assert str(error.value) == (
        f"{source}: is there already, and expand did not write it: it may hold the exact weights\n"
        "  Choose another place to write to, or move that file away."
    )
    assert source.read_bytes() == exact
    source.unlink()
    for _ in range(2):  # what it has written it may write again
        assert pared.expand(small, source.parent) == source
