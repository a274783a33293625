"""The container: what is written is what is read."""

import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from pared.artifact.envelope import open_records
from pared.artifact.index import Index
from pared.artifact.parse import parse_index
from pared.artifact.torch_file import write_torch
from tests.artifact.artifacts import DATA, FIRST, FIRST_DATA, INDEX, PT, SAFE, first_json, parse, parse_record, pt, safe


def test_both_containers_hold_the_same_records(tmp_path: Path) -> None:
    for file in (PT, SAFE):
        (tmp_path / "any name").write_bytes(file)
        for source in (file, tmp_path / "any name", str(tmp_path / "any name")):
            with open_records(source) as records:
                assert (records.index, records.data, records.nbytes) == (INDEX.to_bytes(), DATA, len(file))
                assert parse_index(records) == INDEX


def test_torch_and_safetensors_open_them() -> None:
    records = torch.load(io.BytesIO(PT), weights_only=True)
    assert [bytes(records[name].tolist()) for name in ("index", "data")] == [INDEX.to_bytes(), DATA]
    again = safetensors.numpy.load(SAFE)
    assert [again[name].tobytes() for name in ("index", "data")] == [INDEX.to_bytes(), DATA]
    assert parse(safetensors.numpy.save(again, {"format": "pared"})) == INDEX


def test_the_data_are_aligned_in_the_file() -> None:
    assert PT.index(DATA[:64]) % 64 == SAFE.index(DATA[:64]) % 64 == 0


def test_version_1_is_read() -> None:
    assert parse_record(zlib.compress(json.dumps(first_json()).encode()), FIRST_DATA) == FIRST


def test_parts_stand_without_gaps_but_before_large_ones() -> None:
    parts = [part for entry in INDEX.entries for part in entry.parts.values()]
    *small, large = parts
    assert [part.offset for part in small[1:]] == [part.end for part in small[:-1]]
    assert large.offset == small[-1].end + -small[-1].end % 64 > small[-1].end
    assert [part.offset % 64 for entry in FIRST.entries for part in entry.parts.values()] == [0] * 9


def test_empty_records() -> None:
    empty = Index(()).to_bytes()
    assert parse(pt(empty, b"")) == parse(safe(empty, b"")) == Index(())


def test_views_outlive_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(SAFE)
    with open_records(tmp_path / "a") as records:
        view = records.data[:64]
        array = np.frombuffer(records.data, np.uint8)
    assert bytes(view) == DATA[:64]
    assert array.tobytes() == DATA


def test_an_entry_counts_itself() -> None:
    coded, plain, wide, half, count, none, classed, *_ = INDEX.entries
    assert [e.label for e in INDEX.entries[:6]] == ["grid int8", "grid int8", "grid int16", "float16", "int64", "bool"]
    assert [e.elements for e in (coded, plain, count, none)] == [320, 12, 1, 0]
    assert [e.source_nbytes for e in (plain, half, count)] == [48, 6, 8]
    assert (plain.n_rows, wide.n_rows, classed.n_rows) == (4, 6, 120)
    assert (plain.nbytes, wide.nbytes, half.name) == (12 + 16, 4 * 6, "half")


def test_an_infinite_provenance_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Index((), {}, {"score": float("inf")}).to_bytes()


def record(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8)) if data else torch.empty(0, dtype=torch.uint8)


@pytest.mark.parametrize(("index", "data"), [(1, 0), (5, 100), (200, 64), (300, 70_000), (70_000, 300)])
def test_our_writer_writes_what_torch_writes(index: int, data: int) -> None:
    records = [bytes(i % 251 for i in range(size)) for size in (index, data)]
    theirs, ours = io.BytesIO(), io.BytesIO()
    torch.save({"index": record(records[0]), "data": record(records[1])}, theirs)
    write_torch(ours, records[0], (records[1][:10], records[1][10:]), data)
    assert ours.getvalue() == theirs.getvalue()
    ours.seek(0)
    loaded = torch.load(ours, weights_only=True)
    assert [loaded[key].numpy().tobytes() for key in ("index", "data")] == records


class Counted(io.RawIOBase):
    """A stream that keeps only the beginning and the end of what is written, and how much it was."""

    def __init__(self) -> None:
        self.size = 0
        self.small: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        self.size += len(piece)
        if len(piece) < 1 << 20:
            self.small.append(bytes(piece))
        return len(piece)


@pytest.mark.slow
def test_beyond_four_gibibytes_sizes_have_64_bits() -> None:
    block, stream = bytes(1 << 26), Counted()
    write_torch(stream, b"index", (block for _ in range(65)), 65 << 26)
    directory = b"".join(stream.small).split(b"PK\x01\x02", 1)[1]
    assert (65 << 26).to_bytes(8, "little") in directory
    assert stream.size > 65 << 26
