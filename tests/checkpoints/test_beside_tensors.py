"""What a checkpoint holds beside tensors: free text is kept, and of other values it is said that they are not."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

import pared
from pared.checkpoints import compress
from pared.checkpoints.folders.layout import written_metadata

TOLD = "no tensors, and only training or other programs need them"


def weights() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}


def metadata_of(path: Path) -> Any:
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("said", [{"format": "pt", "modelspec.title": "Ein Bild ☂"}, {"ss_tags": "{}"}, {}, None])
def test_metadata_come_back(said: dict[str, str] | None, tmp_path: Path) -> None:
    safetensors.torch.save_file(weights(), tmp_path / "a.safetensors", metadata=said)
    pared.compress(tmp_path / "a.safetensors", tmp_path / "small")
    back = pared.expand(tmp_path / "small", tmp_path / "back.safetensors")
    assert metadata_of(back) == {"format": "pt", **(said or {}), "pared": "expanded"}


def test_of_several_files_what_all_say_comes_back_in_each(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    for i, name in enumerate("ab"):
        place = tmp_path / "hf" / f"model-0000{i + 1}-of-00002.safetensors"
        safetensors.torch.save_file({name: torch.ones(64, 64) + i}, place, metadata={"by": "me", "part": name})
    placed = {name: f"model-0000{i + 1}-of-00002.safetensors" for i, name in enumerate("ab")}
    index = {"metadata": {}, "weight_map": placed}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    pared.compress(tmp_path / "hf", tmp_path / "small")
    pared.expand(tmp_path / "small", tmp_path / "back")
    for name in placed.values():
        assert metadata_of(tmp_path / "back" / name) == {"format": "pt", "by": "me", "pared": "expanded"}


def test_metadata_count_against_the_size(tmp_path: Path) -> None:
    said = {"text": "".join(chr(97 + i * i % 26) for i in range(3000))}
    safetensors.torch.save_file(weights(), tmp_path / "a.safetensors", metadata=said)
    path = pared.compress(tmp_path / "a.safetensors", tmp_path / "small", max_size=9000)
    assert path.stat().st_size <= 9000


def test_metadata_that_are_too_large_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    safetensors.torch.save_file(weights(), tmp_path / "a.safetensors", metadata={"text": "x" * (1 << 20)})
    pared.compress(tmp_path / "a.safetensors", tmp_path / "small")
    back = pared.expand(tmp_path / "small", tmp_path / "back.safetensors")
    assert metadata_of(back) == {"format": "pt", "pared": "expanded"}
    assert "bytes of metadata are not kept" in caplog.text


@pytest.mark.parametrize("said", [3, ["x"], {"a": 1, "format": "pared"}, None])
def test_what_a_stranger_wrote_in_their_place(said: object) -> None:
    assert written_metadata({"metadata": said}) == {"format": "pt", "pared": "expanded"}


@pytest.mark.parametrize("legacy", [False, True])
def test_values_that_are_no_tensors_are_named(legacy: bool, tmp_path: Path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(64, 64)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    given = {"epoch": 3, "model": weights(), "optimizer": optimizer, "args": {"lr": 1.0}, "best": None}
    torch.save(given, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    done = compress.run(tmp_path / "a.pt", tmp_path / "small", quiet=True)
    assert done.plain == ("epoch", "args", "best")
    assert f"left out: epoch, args, best: {TOLD}" in str(done).splitlines()
    (tmp_path / "folder").mkdir()
    torch.save(given, tmp_path / "folder" / "pytorch_model.bin")
    assert compress.run(tmp_path / "folder", tmp_path / "other", quiet=True).plain == done.plain


def test_a_state_dict_leaves_nothing_to_say(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(64, 64).state_dict(), tmp_path / "a.pt")
    done = compress.run(tmp_path / "a.pt", tmp_path / "small", quiet=True)
    assert done.plain == ()
    assert TOLD not in str(done)
