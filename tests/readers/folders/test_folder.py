"""Folders of weights: every file is accounted for, and an index that lies is refused."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import pared
from pared import readers
from pared.errors import CorruptError, FileError

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(2), "c.weight": torch.zeros(5)}


def shards(folder: Path) -> dict[str, str]:
    placed = {
        "a.weight": "model-00001-of-00002.safetensors",
        "b.weight": "model-00001-of-00002.safetensors",
        "c.weight": "model-00002-of-00002.safetensors",
    }
    for name in set(placed.values()):
        safetensors.torch.save_file({k: WEIGHTS[k] for k, v in placed.items() if v == name}, folder / name)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"a": 1}')
    write_index(folder, placed)
    return placed


def write_index(folder: Path, placed: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def names(folder: Path) -> list[str]:
    with readers.open_listing(folder) as listing:
        return [held.name for held in listing.tensors]


def test_shards_are_one_listing(tmp_path: Path) -> None:
    shards(tmp_path)
    with readers.open_listing(tmp_path) as listing:
        assert listing.kind == "a Hugging Face folder"
        assert [held.name for held in listing.tensors] == list(WEIGHTS)
        for held in listing.tensors:
            array = listing.array(held)
            assert array is not None
            assert array.tolist() == WEIGHTS[held.name].tolist()
        assert {"(config.json)", "(1_Pooling/config.json)", "(model.safetensors.index.json)"} < listing.notes.keys()
    ledger = pared.inspect(tmp_path)
    assert set(ledger.by_format()) == {"float32", "header", "file"}
    assert sum(row.nbytes for row in ledger.rows) == ledger.nbytes == total(tmp_path)


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_variant_is_not_taken_for_the_model(tmp_path: Path) -> None:
    shards(tmp_path)
    variant = "model.fp16-00001-of-00001.safetensors"
    safetensors.torch.save_file({k: v.half() for k, v in WEIGHTS.items()}, tmp_path / variant)
    (tmp_path / "model.fp16.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(WEIGHTS, variant)})
    )
    assert sorted(names(tmp_path)) == sorted([*WEIGHTS, *(f"{variant}/{name}" for name in WEIGHTS)])


def test_a_shard_that_is_missing_is_an_error(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptError, match="it says that 'c.weight' is in 'model-00002-of-00002.safetensors', and the"):
        names(tmp_path)


def test_a_tensor_that_no_shard_has_is_an_error(tmp_path: Path) -> None:
    placed = shards(tmp_path)
    write_index(tmp_path, placed | {"d.weight": "model-00002-of-00002.safetensors"})
    with pytest.raises(CorruptError, match="its index says that 'd.weight' is in 'model-00002-of-00002.safetensors'"):
        names(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", 3, None])
def test_an_index_names_files_of_the_folder(tmp_path: Path, name: object) -> None:
    (tmp_path / "folder").mkdir()
    shards(tmp_path / "folder")
    safetensors.torch.save_file({"a.weight": torch.ones(1)}, tmp_path / "outside.safetensors")
    write_index(tmp_path / "folder", {"a.weight": name})
    with pytest.raises(CorruptError):
        names(tmp_path / "folder")


def test_files_beside_the_main_one_have_a_prefix(tmp_path: Path) -> None:
    safetensors.torch.save_file(WEIGHTS, tmp_path / "model.safetensors")
    torch.save({"a.weight": torch.ones(1)}, tmp_path / "other.bin")
    assert names(tmp_path) == [*WEIGHTS, "other.bin/a.weight"]


def test_several_files_without_an_index_have_prefixes(tmp_path: Path) -> None:
    for part in ("one", "two"):
        torch.save({"weight": torch.ones(1)}, tmp_path / f"{part}.pt")
    assert names(tmp_path) == ["one.pt/weight", "two.pt/weight"]


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileError) as error:
        names(tmp_path)
    assert error.value.what == "holds no file of weights"


def test_an_inc_folder_is_known(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1), "best_configure": {"op": {}}}, tmp_path / "best_model.pt")
    (tmp_path / "best_configure.yaml").write_text("op: {}")
    with readers.open_listing(tmp_path) as listing:
        assert listing.kind == "a folder of Intel Neural Compressor"
        assert [held.name for held in listing.tensors] == ["weight"]
