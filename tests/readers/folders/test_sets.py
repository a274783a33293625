"""Half a model is never taken for a whole one: every part is found, or the error names what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import pared
from pared import readers
from pared.errors import CorruptError, FileError
from pared.readers.folders import sets

STATE = {f"layers.{i}.weight": torch.full((4, 8), float(i)) for i in range(3)}


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    safetensors.torch.save_file(dict(state), path)


def write_torch(state: Mapping[str, Tensor], path: Path) -> None:
    torch.save(dict(state), path)


def write_gguf(state: Mapping[str, Tensor], path: Path) -> None:
    """A file of llama.cpp that says, as those do, that it is one of three."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.no", int(path.stem.split("-")[1]) - 1)
    writer.add_uint16("split.count", 3)
    writer.add_int32("split.tensors.count", 3)
    for name, tensor in state.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


Write = Callable[[Mapping[str, Tensor], Path], None]
KINDS: dict[str, Write] = {
    "model-{}-of-00003.safetensors": write_safetensors,
    "pytorch_model-{}-of-00003.bin": write_torch,
    "m-{}-of-00003.gguf": write_gguf,
}


def shards(folder: Path, pattern: str) -> list[Path]:
    """One tensor in each of three files."""
    folder.mkdir()
    paths = [folder / pattern.format(f"{i:05d}") for i in (1, 2, 3)]
    for path, (name, tensor) in zip(paths, STATE.items(), strict=True):
        KINDS[pattern]({name: tensor}, path)
    return paths


def held(path: Path) -> dict[str, float]:
    """The tensors of a file or folder, by their first number."""
    with readers.open_listing(path) as listing:
        arrays = {tensor.name: listing.array(tensor) for tensor in listing.tensors}
    return {name: float(array.flat[0]) for name, array in arrays.items() if array is not None}


ALL = {name: float(tensor[0, 0]) for name, tensor in STATE.items()}


def refused(path: Path, tmp_path: Path, words: str) -> None:
    """No verb takes it, and nothing is written."""
    output = tmp_path / "refused"
    verbs: list[Callable[[], object]] = [
        lambda: pared.compress(path, output),
        lambda: pared.inspect(path),
        lambda: pared.compare(path, path),
    ]
    for verb in verbs:
        with pytest.raises(FileError, match=words):
            verb()
    assert not output.exists()


@pytest.mark.parametrize("pattern", KINDS)
def test_any_file_of_a_model_stands_for_all(tmp_path: Path, pattern: str) -> None:
    paths = shards(tmp_path / "m", pattern)
    for path in (*paths, tmp_path / "m"):
        assert held(path) == ALL
    small = pared.compress(paths[0], tmp_path / "small")
    back = safetensors.torch.load_file(pared.expand(small, tmp_path / "back.safetensors"))
    assert {name: float(tensor[0, 0]) for name, tensor in back.items()} == ALL


@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize("pattern", KINDS)
def test_a_missing_file_is_named(tmp_path: Path, pattern: str, missing: int) -> None:
    paths = shards(tmp_path / "m", pattern)
    paths.pop(missing).unlink()
    for path in (*paths, tmp_path / "m"):
        refused(path, tmp_path, f"is one of the 3 files of a model, and {pattern.format(f'0000{missing + 1}')} is mis")


def test_a_file_alone_in_another_folder(tmp_path: Path) -> None:
    first, *_ = shards(tmp_path / "m", "m-{}-of-00003.gguf")
    (tmp_path / "alone").mkdir()
    path = first.rename(tmp_path / "alone" / "model.gguf")
    words = "is file 1 of the 3 files of a model, of which 1 were found"
    refused(path, tmp_path, words)
    refused(path.parent, tmp_path, words)


def test_files_of_two_models_do_not_make_one(tmp_path: Path) -> None:
    _, _, third = shards(tmp_path / "m", "m-{}-of-00003.gguf")
    write_gguf({"other": torch.ones(4, 8), "more": torch.ones(4, 8)}, third)
    refused(tmp_path / "m", tmp_path, "its files say that the model has 3 tensors, and hold 4")


def index(folder: Path, placed: Mapping[str, str], name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"weight_map": dict(placed)}))
    return folder / name


def odd_shards(folder: Path) -> dict[str, str]:
    """Shards whose names say nothing: only the index does."""
    folder.mkdir()
    placed = {name: f"{part}.safetensors" for name, part in zip(STATE, ("head", "body", "tail"), strict=True)}
    for name, file in placed.items():
        write_safetensors({name: STATE[name]}, folder / file)
    return placed


def test_an_index_finds_files_whose_names_say_nothing(tmp_path: Path) -> None:
    placed = odd_shards(tmp_path / "m")
    path = index(tmp_path / "m", placed)
    for one in (tmp_path / "m", path, tmp_path / "m" / "body.safetensors"):
        assert held(one) == ALL
    (tmp_path / "m" / "tail.safetensors").unlink()
    for one in (tmp_path / "m", path, tmp_path / "m" / "body.safetensors"):
        refused(one, tmp_path, "'layers.2.weight' is in 'tail.safetensors', and the folder has no such file")


def test_an_index_that_leaves_out_a_shard(tmp_path: Path) -> None:
    paths = shards(tmp_path / "m", "model-{}-of-00003.safetensors")
    index(tmp_path / "m", {name: path.name for name, path in zip(STATE, paths[:2], strict=False)})
    assert held(tmp_path / "m") == ALL  # the file is there, whatever the index says
    paths[2].unlink()
    refused(tmp_path / "m", tmp_path, r"and model-00003-of-00003\.safetensors is missing")


def test_tensors_that_an_index_leaves_out_are_taken(tmp_path: Path) -> None:
    paths = shards(tmp_path / "m", "model-{}-of-00003.safetensors")
    write_safetensors({"layers.0.weight": STATE["layers.0.weight"], "more": torch.ones(2, 2)}, paths[0])
    index(tmp_path / "m", {name: path.name for name, path in zip(STATE, paths, strict=True)})
    assert held(tmp_path / "m") == ALL | {"more": 1.0}


def test_the_index_of_files_that_were_not_fetched_is_no_obstacle(tmp_path: Path) -> None:
    shards(tmp_path / "m", "model-{}-of-00003.safetensors")
    index(tmp_path / "m", {"layers.0.weight": "pytorch_model-00001-of-00002.bin"}, "pytorch_model.bin.index.json")
    assert held(tmp_path / "m") == ALL


def test_an_index_alone_says_what_to_fetch(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    index(tmp_path / "m", {"w": "model-00001-of-00001.safetensors"})
    (tmp_path / "m" / "config.json").write_text("{}")
    refused(tmp_path / "m", tmp_path, r"'w' is in 'model-00001-of-00001\.safetensors', and the folder has no such file")


def test_one_file_is_taken_before_an_index_that_is_left_over(tmp_path: Path) -> None:
    shards(tmp_path / "m", "model-{}-of-00003.safetensors")
    write_safetensors({"new": torch.full((2, 2), 9.0)}, tmp_path / "m" / "model.safetensors")
    index(tmp_path / "m", {"layers.0.weight": "model-00001-of-00003.safetensors"})
    with readers.open_listing(tmp_path / "m") as listing:
        assert [one.name for one in listing.tensors if "/" not in one.name] == ["new"]


@pytest.mark.parametrize("name", ["model-0-of-3.safetensors", "model.00000_of_00003.safetensors", "a.0-of-3"])
def test_numbers_from_zero_and_other_separators(tmp_path: Path, name: str) -> None:
    names = [name.replace("0-of", f"{i}-of").replace("00000_of", f"0000{i}_of") for i in range(3)]
    for one, (key, tensor) in zip(names, STATE.items(), strict=True):
        write_safetensors({key: tensor}, tmp_path / one)
    assert held(tmp_path / names[1]) == ALL
    (tmp_path / names[0]).unlink()
    with pytest.raises(FileError, match=r"is missing|are missing"):
        held(tmp_path / names[1])


@pytest.mark.parametrize(
    "names",
    [
        ["pytorch_model_part-0.bin", "pytorch_model_part-1.bin"],
        ["model_part-0.bin"],
        ["consolidated.00.pth", "consolidated.01.pth"],
        ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
        ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"],
        ["model_world_size_2_rank_0.pt"],
        ["zero_pp_rank_0_mp_rank_00_model_states.pt"],
        ["shard-00001-model-00001-of-00001.safetensors"],
    ],
)
def test_parts_whose_number_nobody_knows_are_refused(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "m").mkdir()
    for name in names:
        write_torch({"w": torch.ones(2, 2)}, tmp_path / "m" / name)
    for path in (tmp_path / "m", tmp_path / "m" / names[0]):
        refused(path, tmp_path, "is one of .*files of a model")


@pytest.mark.parametrize("name", ["consolidated.00.pth", "checkpoint_rank0.pt", "mp_rank_00_model_states.pt"])
def test_the_only_process_saves_a_whole_model(tmp_path: Path, name: str) -> None:
    write_torch({"w": torch.ones(2, 2)}, tmp_path / name)
    assert held(tmp_path / name) == held(tmp_path) == {"w": 1.0}


def test_the_only_file_of_a_larger_llama_is_a_slice(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    path = tmp_path / "m" / "consolidated.00.pth"
    (tmp_path / "m" / "params.json").write_text(json.dumps({"dim": 16, "n_heads": 4}))
    write_torch({"layers.0.attention.wq.weight": torch.ones(8, 16), "norm.weight": torch.ones(16)}, path)
    for one in (path, tmp_path / "m"):
        refused(one, tmp_path, "is one of 2 files of a model, each of which may hold a slice of every tensor")
    write_torch({"layers.0.attention.wq.weight": torch.ones(16, 16)}, path)
    assert held(path) == held(tmp_path / "m") == {"layers.0.attention.wq.weight": 1.0}


def test_numbers_after_the_suffix(tmp_path: Path) -> None:
    for i, (name, tensor) in enumerate(STATE.items()):
        write_torch({name: tensor}, tmp_path / f"pytorch_model.bin-0000{i + 1}-of-00003")
    assert held(tmp_path) == held(tmp_path / "pytorch_model.bin-00002-of-00003") == ALL
    (tmp_path / "pytorch_model.bin-00003-of-00003").unlink()
    with pytest.raises(FileError, match="pytorch_model.bin-00003-of-00003 is missing"):
        held(tmp_path)


def test_a_file_that_says_over_how_many_processes_it_is_divided(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    path = tmp_path / "m" / "mp_rank_00_model_states.pt"
    torch.save({"module": {"w": torch.ones(2, 2)}, "mp_world_size": 2}, path)
    refused(path, tmp_path, "is one of 2 files of a model, each of which may hold a slice of every tensor")
    torch.save({"module": {"w": torch.ones(2, 2)}, "mp_world_size": 1}, path)
    assert held(path) == {"module/w": 1.0}


def test_folders_of_several_processes(tmp_path: Path) -> None:
    for rank in ("mp_rank_00", "mp_rank_01"):
        (tmp_path / "m" / rank).mkdir(parents=True)
        write_torch({"w": torch.ones(2, 2)}, tmp_path / "m" / rank / "weights.pt")
    refused(tmp_path / "m" / "mp_rank_00" / "weights.pt", tmp_path, "is one of 2 files of a model")


@pytest.mark.parametrize("name", ["epoch-1-of-3.pt", "fold_1_of_5.pt", "model_2.pt", "lora_rank_16.pt", "model.pt.2"])
def test_a_number_alone_makes_no_part(tmp_path: Path, name: str) -> None:
    write_torch({"w": torch.ones(2, 2)}, tmp_path / name)
    assert held(tmp_path / name) == {"w": 1.0}


@pytest.mark.parametrize(
    "name", ["model.safetensors.part1", "model.gguf.part1of2", "model.bin.001", "model.gguf-split-a"]
)
def test_a_piece_of_a_cut_file_says_how_to_join_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "m").mkdir()
    whole = tmp_path / "m" / "whole.safetensors"
    write_safetensors(STATE, whole)
    for one in (name, name.replace("001", "002")):
        (tmp_path / "m" / one).write_bytes(whole.read_bytes()[:300])
    whole.unlink()
    refused(tmp_path / "m" / name, tmp_path, r"is a piece of 'model\.\w+', which was cut into several\n.*: cat model")


def test_of_a_piece_in_a_folder_too(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors.part1").write_bytes(b"x")
    refused(tmp_path / "m", tmp_path, "is a piece of 'model.safetensors'")


@pytest.mark.parametrize("name", ["m-00001-of-00003.gguf", "m-00001-of-00003.safetensors"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError, match="No such file"):
        held(tmp_path / name)


def test_numbers_of_the_same_name_and_another_count_are_another_model(tmp_path: Path) -> None:
    for count in (2, 3):
        for i in range(count):
            name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            write_safetensors({f"{count}.{i}": torch.full((2, 2), float(i))}, tmp_path / name)
    assert set(held(tmp_path / "model-00001-of-00002.safetensors")) == {"2.0", "2.1"}
    assert set(held(tmp_path / "model-00003-of-00003.safetensors")) == {"3.0", "3.1", "3.2"}


def test_a_file_in_a_crowd_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_torch({"w": torch.ones(2, 2)}, tmp_path / "m.pt")
    for i in range(30):
        (tmp_path / f"{i}.txt").touch()
    (tmp_path / "foreign.index.json").write_text("{")
    monkeypatch.setattr("pared.readers.folders.files._MOST_FILES", 10)
    assert held(tmp_path / "m.pt") == {"w": 1.0}
    with pytest.raises(FileError, match="holds more than 10 files"):
        held(tmp_path)


def test_the_index_of_a_damaged_folder(tmp_path: Path) -> None:
    paths = shards(tmp_path / "m", "model-{}-of-00003.safetensors")
    (tmp_path / "m" / "model.safetensors.index.json").write_text("{")
    for path in (paths[0], tmp_path / "m"):
        with pytest.raises(CorruptError, match="is not valid JSON"):
            held(path)


def test_numbers_are_compared_with_numpy(tmp_path: Path) -> None:
    paths = shards(tmp_path / "m", "model-{}-of-00003.safetensors")
    with readers.open_listing(paths[2]) as listing:
        for one in listing.tensors:
            array = listing.array(one)
            assert array is not None
            assert np.array_equal(array, STATE[one.name].numpy())
        assert listing.kind == "a .safetensors file, one of 3 files"
        assert listing.nbytes == sum(path.stat().st_size for path in paths)


def test_the_shards_of_an_index_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each of them: a large model has hundreds."""
    pattern = "model-{}-of-00003.safetensors"
    shards(tmp_path / "m", pattern)
    placed = {name: pattern.format(f"{i:05d}") for i, name in enumerate(STATE, 1)}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    looked: list[str] = []
    by_numbers = sets._by_numbers

    def noted(folder: Path, name: str, sizes: Mapping[str, int]) -> sets.WeightSet | None:
        looked.append(name)
        return by_numbers(folder, name, sizes)

    monkeypatch.setattr(sets, "_by_numbers", noted)
    assert held(tmp_path / "m") == ALL
    assert looked == [pattern.format("00001")]
