"""Checkpoints of torch.distributed.checkpoint are read as torch reads them, and nothing in them runs."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_saver import save as save_all

import pared
from pared import readers
from pared.errors import CorruptError, FileError, UnsafeError

Cut = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


def save(state: dict[str, Any], folder: Path) -> None:
    """What one process writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        save_all(state, checkpoint_id=folder, no_dist=True)


def write(tensors: Mapping[str, tuple[Tensor, list[Cut]]], folder: Path, **changes: Any) -> None:
    """What several processes write: each chunk in the file of its own process."""
    folder.mkdir()
    state: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for name, (tensor, cuts) in tensors.items():
        chunks = []
        for rank, (offsets, sizes) in enumerate(cuts):
            part = tensor[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))].clone()
            stream = io.BytesIO()
            torch.save(part, stream)
            path = folder / f"__{rank}_0.distcp"
            begin = path.stat().st_size if path.exists() else 0
            with path.open("ab") as file:
                file.write(stream.getvalue())
            chunks.append(described.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            index = described.MetadataIndex(name, torch.Size(offsets), rank)
            places[index] = _StorageInfo(path.name, begin, len(stream.getvalue()))
        properties = described.TensorProperties(tensor.dtype)
        state[name] = described.TensorStorageMetadata(properties, tensor.shape, chunks)
    whole = described.Metadata(state, changes.pop("planner_data", {name: (name,) for name in tensors}), places)
    for key, change in changes.items():
        change(getattr(whole, key))
    (folder / ".metadata").write_bytes(pickle.dumps(whole))


def held(path: Path) -> dict[str, list[Any]]:
    with readers.open_listing(path) as listing:
        arrays = {tensor.name: listing.array(tensor) for tensor in listing.tensors}
    return {name: array.tolist() for name, array in arrays.items() if array is not None}


GRID = torch.arange(24.0).reshape(4, 6)
ROWS: list[Cut] = [((0, 0), (2, 6)), ((2, 0), (2, 6))]
BLOCKS: list[Cut] = [((0, 0), (3, 2)), ((0, 2), (3, 4)), ((3, 0), (1, 2)), ((3, 2), (1, 4))]
CUTS = {
    "model.rows": (GRID, ROWS),
    "model.blocks": (GRID.half() + 1, BLOCKS),
    "model.whole": (GRID.T.contiguous().bfloat16(), [((0, 0), (6, 4))]),
    "model.uneven": (torch.arange(3), [((0,), (2,)), ((2,), (1,)), ((3,), (0,))]),
    "model.number": (torch.tensor(2.5), [((), ())]),
}
NESTED = {name: tuple(name.split(".", 1)) for name in CUTS}


def test_tensors_are_put_together_from_their_chunks(tmp_path: Path) -> None:
    write(CUTS, tmp_path / "dcp", planner_data=NESTED)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")  # what torch makes of it
    expected = torch.load(tmp_path / "whole.pt")["model"]
    assert {f"model/{name}": tensor.tolist() for name, tensor in expected.items()} == held(tmp_path / "dcp")
    assert held(tmp_path / "dcp")["model/blocks"] == (GRID.half() + 1).tolist()
    for one in (".metadata", "__0_0.distcp", "__3_0.distcp"):
        assert held(tmp_path / "dcp" / one) == held(tmp_path / "dcp")
    ledger = pared.inspect(tmp_path / "dcp")
    assert sum(row.nbytes for row in ledger.rows) == ledger.nbytes
    assert ledger.nbytes == sum(path.stat().st_size for path in (tmp_path / "dcp").iterdir())


def test_a_training_is_its_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "dcp")
    (tmp_path / "dcp" / "config.json").write_text("{}")
    assert "epoch" not in held(tmp_path / "dcp")
    pared.compress(tmp_path / "dcp", tmp_path / "small")
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["best_model.pt", "config.json"]
    back = safetensors.torch.load_file(pared.expand(tmp_path / "small", tmp_path / "back.safetensors"))
    assert set(back) == set(model.state_dict())
    assert torch.allclose(back["0.weight"], model[0].weight, atol=0.01)
    assert torch.allclose(back["1.running_mean"], model.state_dict()["1.running_mean"], atol=1e-3)
    assert back["1.num_batches_tracked"] == 1


def test_a_checkpoint_beside_the_state_of_an_optimizer(tmp_path: Path) -> None:
    """As accelerate saves a model that FSDP has divided."""
    save({"w": torch.ones(2, 2)}, tmp_path / "pytorch_model_fsdp_0")
    save({"state.w.exp_avg": torch.ones(2, 2)}, tmp_path / "optimizer_0")
    (tmp_path / "scheduler.bin").write_bytes(b"x")
    with readers.open_listing(tmp_path) as listing:
        assert [one.name for one in listing.tensors if listing.array(one) is not None][-1] == "w"
    assert held(tmp_path / "pytorch_model_fsdp_0") == {"w": [[1.0, 1.0], [1.0, 1.0]]}


def lost(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def without_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def short(folder: Path) -> None:
    content = (folder / "__1_0.distcp").read_bytes()
    (folder / "__1_0.distcp").write_bytes(content[:-30])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lost, "is in '__1_0.distcp', which is missing"),
        (without_metadata, r"without its file \.metadata"),
        (short, "it ends at byte"),
    ],
)
def test_half_a_checkpoint_is_refused(damage: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    write({"w": (GRID, ROWS)}, tmp_path / "dcp")
    damage(tmp_path / "dcp")
    for path in (tmp_path / "dcp", tmp_path / "dcp" / "__0_0.distcp"):
        with pytest.raises(FileError, match=words):
            pared.compress(path, tmp_path / "out")
        with pytest.raises(FileError, match=words):
            pared.inspect(path)
    assert not (tmp_path / "out").exists()


def test_what_the_chunks_do_not_fill_is_refused(tmp_path: Path) -> None:
    write({"w": (GRID, ROWS[:1])}, tmp_path / "some")
    with pytest.raises(CorruptError, match="its chunks do not fill it"):
        held(tmp_path / "some")
    overlapping: list[Cut] = [((0, 0), (2, 6)), ((1, 0), (2, 6))]
    write({"w": (GRID, overlapping)}, tmp_path / "twice")
    with pytest.raises(CorruptError, match="two of its chunks overlap"):
        held(tmp_path / "twice")


def test_files_are_those_of_the_folder(tmp_path: Path) -> None:
    for i, name in enumerate(("../secret", "/etc/passwd", "a/../../b")):

        def elsewhere(places: dict[Any, Any], name: str = name) -> None:
            for info in places.values():
                info.relative_path = name

        folder = tmp_path / str(i)
        write({"w": (GRID, ROWS)}, folder, storage_data=elsewhere)
        with pytest.raises(CorruptError, match="which is not a path inside the folder"):
            held(folder)


def test_a_coding_that_is_not_read_says_so(tmp_path: Path) -> None:
    def coded(places: dict[Any, Any]) -> None:
        for info in places.values():
            info.transform_descriptors = ["zstd"]

    write({"w": (GRID, ROWS)}, tmp_path / "dcp", storage_data=coded)
    with pytest.raises(FileError, match=r"in a coding that pared does not read\n.*dcp_to_torch"):
        held(tmp_path / "dcp")


def test_a_chunk_that_is_not_what_it_should_be(tmp_path: Path) -> None:
    def other(state: dict[str, Any]) -> None:
        state["w"].properties.dtype = torch.int32

    write({"w": (GRID, ROWS)}, tmp_path / "dcp", state_dict_metadata=other)
    with pytest.raises(CorruptError, match=r"its chunk at \[0, 0\] is not what the metadata says"):
        held(tmp_path / "dcp")


class Runs:
    """A value whose unpickling runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_metadata_that_would_run_code_does_not(tmp_path: Path) -> None:
    write({"w": (GRID, ROWS)}, tmp_path / "dcp", planner_data={"w": ("w",), "x": Runs(f"touch {tmp_path}/ran")})
    assert held(tmp_path / "dcp") == {"w": GRID.tolist()}
    with readers.open_listing(tmp_path / "dcp") as listing:
        assert listing.imports == (f"{os.system.__module__}.system",)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"{}", pickle.dumps({"a": 1}), pickle.dumps(3), b"\x80" * 99])
def test_metadata_that_are_not_metadata(tmp_path: Path, content: bytes) -> None:
    write({"w": (GRID, ROWS)}, tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(content)
    with pytest.raises((CorruptError, UnsafeError, FileError)):
        held(tmp_path / "dcp")


def test_bytes_between_the_chunks_are_found(tmp_path: Path) -> None:
    write({"w": (GRID, ROWS)}, tmp_path / "dcp")
    with (tmp_path / "dcp" / "__1_0.distcp").open("ab") as file:
        file.write(b"more" * 1000)
    assert [finding.kind for finding in pared.inspect(tmp_path / "dcp").findings] == ["stray-bytes"]
    with pytest.raises(FileError, match="has 4,000 bytes that are in __1_0.distcp, and belong to no tensor"):
        pared.compress(tmp_path / "dcp", tmp_path / "out")
