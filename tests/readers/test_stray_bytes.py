"""Bytes of a file that no tensor accounts for: an error for compress, a finding for inspect."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from onnx import helper, numpy_helper

import pared
from pared.errors import CorruptError, FileError

FIRST, SECOND = {"a": torch.arange(2000.0)}, {"b": torch.ones(3000)}


def torch_file(state: object, *, new: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream, _use_new_zipfile_serialization=new)
    return stream.getvalue()


def gguf_file(path: Path, name: str) -> bytes:
    writer = gguf.GGUFWriter(path / name, "llama")
    for i in range(3):
        writer.add_tensor(f"{name}.{i}", np.ones((3, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (path / name).read_bytes()


def two_folders(_: Path) -> bytes:
    """An archive with two models in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for i, state in enumerate((FIRST, SECOND)):
            with zipfile.ZipFile(io.BytesIO(torch_file(state))) as one:
                for info in one.infolist():
                    archive.writestr(info.filename.replace("archive", f"model{i}"), one.read(info))
    return stream.getvalue()


TWO: dict[str, Callable[[Path], bytes]] = {
    "two archives of torch": lambda _: torch_file(FIRST) + torch_file(SECOND),
    "two models in one archive": two_folders,
    "an archive with bytes after its end": lambda _: torch_file(FIRST) + b"more" * 5000,
    "two files of old torch": lambda _: torch_file(FIRST, new=False) + torch_file(SECOND, new=False),
    "two files of llama.cpp": lambda path: gguf_file(path, "a") + gguf_file(path, "b"),
    "an archive after an old file": lambda _: torch_file(FIRST, new=False) + torch_file(SECOND),
}


@pytest.mark.parametrize("kind", TWO)
def test_a_second_model_in_a_file_is_not_passed_over(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(TWO[kind](tmp_path))
    with pytest.raises(FileError, match=r"has [\d,]+ bytes that are .*another file may have been appended"):
        pared.compress(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ledger = pared.inspect(path)
    assert "stray-bytes" in [finding.kind for finding in ledger.findings]
    assert sum(row.nbytes for row in ledger.rows) == ledger.nbytes == path.stat().st_size


def test_a_safetensors_file_ends_with_its_last_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save(FIRST) + safetensors.torch.save(SECOND))
    for verb in (pared.inspect, lambda path: pared.compress(path, tmp_path / "out")):
        with pytest.raises(CorruptError, match="the rest does not belong to any tensor"):
            verb(path)


def test_two_onnx_models_in_a_file(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    model = helper.make_model(helper.make_graph([], "g", [], [], [weight])).SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    assert [row.name for row in pared.inspect(path).rows if row.shape] == ["w"]
    path.write_bytes(model + model)
    for verb in (pared.inspect, lambda path: pared.compress(path, tmp_path / "out")):
        with pytest.raises(CorruptError, match="it holds two models, one after the other"):
            verb(path)


def test_slices_of_tensors_are_not_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for offsets, whole in (([0, 0], True), ([4, 0], False)):
        metadata = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": offsets}})}
        safetensors.torch.save_file({"w": torch.ones(4, 4)}, path, metadata)
        if whole:
            pared.compress(path, tmp_path / "out")
            continue
        with pytest.raises(FileError, match=r"holds slices of tensors: its part of 'w' begins at \[4, 0\]"):
            pared.compress(path, tmp_path / "again")


WHOLE: dict[str, Callable[[Path], bytes]] = {
    "an archive of torch": lambda _: torch_file(FIRST),
    "an old file": lambda _: torch_file(FIRST, new=False),
    "GGUF": lambda path: gguf_file(path, "a"),
    "GGUF, padded": lambda path: gguf_file(path, "a") + bytes(4096),
    "an archive, padded": lambda _: torch_file(FIRST) + bytes(512),
    "an archive that was packed again": lambda _: packed_again(torch_file(FIRST)),
    "npz": lambda _: npz(),
}


def packed_again(file: bytes) -> bytes:
    """An archive with a comment, written as a stream: a descriptor follows each member."""
    stream = io.BytesIO()

    class Pipe(io.RawIOBase):
        def write(self, data: Any) -> int:
            return stream.write(data)

        def writable(self) -> bool:
            return True

    with zipfile.ZipFile(Pipe(), "w") as archive, zipfile.ZipFile(io.BytesIO(file)) as source:
        for info in source.infolist():
            archive.writestr(info.filename, source.read(info))
        archive.comment = b"packed again"
    return stream.getvalue()


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.arange(2000.0))
    return stream.getvalue()


@pytest.mark.parametrize("kind", WHOLE)
def test_padding_is_not_stray(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(WHOLE[kind](tmp_path))
    assert "stray-bytes" not in [finding.kind for finding in pared.inspect(path).findings]
    pared.compress(path, tmp_path / "out")


def test_only_the_files_of_the_model_count(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    safetensors.torch.save_file(FIRST, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "other.pt").write_bytes(torch_file(FIRST) + torch_file(SECOND))
    pared.compress(tmp_path / "m", tmp_path / "out")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(FileError, match="belong to no tensor"):
        pared.compress(tmp_path / "m", tmp_path / "out")
