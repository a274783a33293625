"""The container: what is written is what is read, and every kind of damage has its own words."""

import io
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.artifact.envelope import Records, open_records
from pared.artifact.index import Entry, Index, Part, start_of
from pared.artifact.parse import parse_index
from pared.artifact.torch_file import write_torch
from pared.errors import CorruptError, FileError, ParedError, UnsafeError, VersionError
from pared.files.disk import make_directory, write_atomic
from pared.files.safetensors_file import write_safetensors
from pared.formats import entropy
from pared.formats.entropy import Coding
from tests.mutations import mutations

Json = dict[str, Any]
Edit = Callable[[Json], object]

DAMAGED = "Fetch the file again; it is damaged."
UNSAFE = "Do not use this file: pared writes nothing like it, and reading it could exhaust the memory."


class Writer:
    """Puts tensors into data, by the rules of a version of the format."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.data = bytearray()

    def entry(
        self, name: str, shape: tuple[int, ...], view: Any, format: Json, dtype: str = "float32", **payloads: Any
    ) -> Entry:
        """Payloads: bytes, or bytes and what else a part has."""
        given = [(n.replace("_", " "), p if isinstance(p, tuple) else (p, {})) for n, p in payloads.items()]
        parts, crc32 = {}, 0
        for i, (part, (payload, more)) in enumerate(given):
            start = start_of(len(self.data), len(payload), self.version)
            self.data.extend(bytes(start - len(self.data)) + payload)
            crc32 = zlib.crc32(payload, crc32 if self.version == 2 else 0)
            last = self.version == 1 or i == len(given) - 1
            parts[part] = Part(start, len(payload), crc32 if last else None, **more)
        names, kind = (name, "tied") if name == "half" else (name,), "buffer" if view is None else "parameter"
        bits = 8.0 if view is not None else None
        return Entry(names, kind, dtype, shape, format, view, bits, "small" if name == "half" else "", parts)


def floats(count: int) -> bytes:
    return np.linspace(0.5, 1.0, count, dtype="<f4").tobytes()


def coded(codes: Any, **more: int) -> tuple[bytes, Json]:
    stream = entropy.encode(np.array(codes, np.int8))
    assert stream.coding is not None
    return stream.payload, {"coding": stream.coding, **more}


def artifact(version: int = 2) -> tuple[Index, bytes]:
    """An index with every kind of entry that a version has, and its data."""
    writer = Writer(version)
    int8, int16, raw = {"tag": "grid", "codes": "int8"}, {"tag": "grid", "codes": "int16"}, {"tag": "raw"}
    constant = (b"", {"coding": Coding(constant=300)})
    stream = coded([0, 0, 1, 0, -1] * 64)
    entries = [
        writer.entry("coded", (4, 80), ((4, 80), (0,)), int8, codes=stream, step=floats(4)),
        writer.entry("plain", (3, 4), ((3, 4), (1,)), int8, codes=bytes(range(12)), step=floats(4)),
        writer.entry("wide", (4, 3), ((2, 2, 3), (0, 2)), int16, codes=constant, step=floats(6)),
        writer.entry("half", (3,), None, {"tag": "float", "dtype": "float16"}, "bfloat16", values=bytes(6)),
        writer.entry("count", (), None, raw, "int64", values=bytes(8)),
        writer.entry("none", (0, 5), None, raw, "bool", values=b""),
    ]
    if version == 2:
        scale = (b"\x01\x00\xff\x80\x01\x05", {"base": -40})
        entries += [
            writer.entry(
                "classed", (60, 2, 3), ((60, 2, 3), (0, 1)), int16, classes=coded([0, 0, 0, 1] * 30),
                codes_0=coded([0, 1, 0] * 90, rows=90), codes_1=(bytes(180), {"rows": 30}),
                step=coded([0, 0, 1] * 40, base=7),
            ),
            writer.entry("scaled", (6, 1), ((6, 1), (0,)), int8, codes=bytes(6), step=scale),
            writer.entry("large", (1024,), None, raw, values=floats(1024)),
        ]  # fmt: skip
    modules = {"": {"mode": "dynamic"}, "a": {"mode": "static", "low": -1.0, "high": 2.5}, "b": {"mode": "gather"}}
    return Index(tuple(entries), modules, {"versions": {"torch": "2"}}), bytes(writer.data)


def first_json() -> Json:
    """The index of version 1, which nothing writes any more."""
    known = FIRST.to_json()
    known["pared"] = 1
    for written, entry in zip(known["tensors"], FIRST.entries, strict=True):
        del written["crc32"]
        for name, part in entry.parts.items():
            coding = {} if part.coding is None else {"coding": part.coding.to_json()}
            written["parts"][name] = {"offset": part.offset, "length": part.length, "crc32": part.crc32, **coding}
    return known


INDEX, DATA = artifact()
FIRST, FIRST_DATA = artifact(version=1)


def pt(index: bytes, data: bytes) -> bytes:
    file = io.BytesIO()
    tensors = {
        "index": torch.tensor(list(index), dtype=torch.uint8),
        "data": torch.tensor(list(data), dtype=torch.uint8),
    }
    torch.save(tensors, file)
    return file.getvalue()


def safe(index: bytes, data: bytes) -> bytes:
    file = io.BytesIO()
    write_safetensors(file, index, data)
    return file.getvalue()


PT, SAFE = pt(INDEX.to_bytes(), DATA), safe(INDEX.to_bytes(), DATA)


def parse(file: bytes) -> Index:
    with open_records(file, "file") as records:
        return parse_index(records)


def parse_record(record: bytes, data: bytes = DATA) -> Index:
    return parse_index(Records("file", 0, record, memoryview(data)))


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


# --- an index that lies


def edited(edit: Edit, known: Json | None = None) -> bytes:
    known = INDEX.to_json() if known is None else known
    edit(known)
    return zlib.compress(json.dumps(known).encode())


def at(position: int, *path: str) -> Callable[[Any], Edit]:
    """An edit that sets one value in one entry."""

    def setter(value: Any) -> Edit:
        def edit(index: Json) -> None:
            place = index["tensors"][position]
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value

        return edit

    return setter


def top(**values: Any) -> Edit:
    return lambda index: index.update(values)


def without(key: str) -> Edit:
    return lambda index: index.pop(key)


CODED, PLAIN, WIDE, HALF, COUNT, NONE, CLASSED, SCALED = range(8)

# In both versions.
LIES: dict[str, tuple[Edit, str]] = {
    "no list of tensors": (without("tensors"), "file: its index lacks 'tensors'"),
    "an unknown key": (top(more=1), "file: its index has an unknown field 'more'"),
    "no version": (without("pared"), "file: its index does not state a version of the format"),
    "version zero": (top(pared=0), "file: its index does not state a version of the format"),
    "version true": (top(pared=True), "file: its index does not state a version of the format"),
    "tensors by name": (top(tensors={}), "file: the list of tensors is not a list"),
    "an entry that is none": (top(tensors=[3]), "file: an entry of its index is not an object"),
    "a name that is none": (at(PLAIN, "name")(7), "file: the name of a tensor is not printable text"),
    "half a character": (at(PLAIN, "name")("\ud800"), "file: the name of a tensor is not printable text"),
    "one name twice": (at(PLAIN, "name")("coded"), "file: two tensors have the name 'coded'"),
    "an alias that is a name": (at(HALF, "aliases")(["plain"]), "file: two tensors have the name 'plain'"),
    "an unknown kind": (at(PLAIN, "kind")("x"), "file: plain: its kind 'x' is not one of parameter, buffer"),
    "an unhashable kind": (at(PLAIN, "kind")([]), "file: plain: its kind is not printable text"),
    "an unknown dtype": (
        at(COUNT, "dtype")("int128"),
        "file: count: its dtype 'int128' is not one of bool, uint8, int8, int16, int32, int64, float16, bfloat16, "
        "float32, float64, complex64, complex128",
    ),
    "an unknown format": (
        at(PLAIN, "format")({"tag": "mesh"}),
        "file: plain: its format 'mesh' is not one of grid, float, raw",
    ),
    "an unknown code type": (
        at(PLAIN, "format")({"tag": "grid", "codes": "int4"}),
        "file: plain: codes 'int4' is not one of int8, int16",
    ),
    "a grid of integers": (
        at(PLAIN, "dtype")("int32"),
        "file: plain: its format is grid, which cannot hold int32",
    ),
    "a field too many": (at(PLAIN, "zero")(0), "file: plain: its entry has an unknown field 'zero'"),
    "a part too many": (
        at(HALF, "parts", "step")({}),
        "file: half: the object of its parts has an unknown field 'step'",
    ),
    "a part too few": (
        lambda index: index["tensors"][PLAIN]["parts"].pop("step"),
        "file: plain: the object of its parts lacks 'step'",
    ),
    "a negative size": (
        at(PLAIN, "shape")([-3, -4]),
        f"file: plain: a size in its shape is not an integer from 0 to {2**63 - 1}",
    ),
    "a size that is not an integer": (
        at(PLAIN, "shape")([3.0, 4]),
        f"file: plain: a size in its shape is not an integer from 0 to {2**63 - 1}",
    ),
    "a size that is a truth": (
        at(PLAIN, "shape")([True, 12]),
        f"file: plain: a size in its shape is not an integer from 0 to {2**63 - 1}",
    ),
    "a huge shape": (at(PLAIN, "shape")([2**40, 2**40]), "file: plain: its shape is larger than any tensor"),
    "a huge empty shape": (
        at(PLAIN, "shape")([0, 2**40, 2**40]),
        "file: plain: its shape is larger than any tensor",
    ),
    "too many dimensions": (at(PLAIN, "shape")([1] * 65), "file: plain: its shape is larger than any tensor"),
    "a view of another size": (
        at(PLAIN, "view")({"split": [3, 5], "rows": [0]}),
        "file: plain: its view (split [3, 5], rows [0]) does not fit shape [3, 4]",
    ),
    "a row that is not a dimension": (
        at(PLAIN, "view")({"split": [3, 4], "rows": [2]}),
        "file: plain: its view (split [3, 4], rows [2]) does not fit shape [3, 4]",
    ),
    "a row twice": (
        at(PLAIN, "view")({"split": [3, 4], "rows": [1, 1]}),
        "file: plain: its view (split [3, 4], rows [1, 1]) does not fit shape [3, 4]",
    ),
    "a view of plain values": (
        at(HALF, "view")({"split": [3], "rows": [0]}),
        "file: half: it has a view, which only a grid has",
    ),
    "bits that are none": (at(PLAIN, "bits")("8"), "file: plain: its bits is not a finite number"),
    "infinite bits": (at(PLAIN, "bits")(1e999), "file: its index is not valid JSON: Infinity is not a number"),
    "an unknown coding": (
        at(CODED, "parts", "codes", "coding")({"per_symbol": 5}),
        "file: coded: {'per_symbol': 5} is not a coding",
    ),
    "a coding with more": (
        at(CODED, "parts", "codes", "coding")({"per_symbol": 1, "x": 1}),
        "file: coded: {'per_symbol': 1, 'x': 1} is not a coding",
    ),
    "an unknown mode": (
        top(modules={"a": {"mode": "fast"}}),
        "file: the mode of module 'a' 'fast' is not one of static, dynamic, gather",
    ),
    "a range that is none": (
        top(modules={"a": {"mode": "static", "low": 1, "high": 2}}),
        "file: module 'a' has a range without zero, or beyond float32",
    ),
    "a range where none belongs": (
        top(modules={"a": {"mode": "dynamic", "low": 0}}),
        "file: module 'a' has an unknown field 'low'",
    ),
    "a provenance that is none": (top(provenance=[]), "file: provenance is not an object"),
}


# Where parts stand, in version 1.
FIRST_LIES: dict[str, tuple[Edit, str]] = {
    "another shape": (
        at(HALF, "shape")([4]),
        "file: half: its values has 6 bytes where shape [4] needs 8",
    ),
    "other rows": (
        at(PLAIN, "view")({"split": [3, 4], "rows": [0]}),
        "file: plain: its step has 16 bytes where shape [3, 4] needs 12",
    ),
    "a step that is coded": (
        at(PLAIN, "parts", "step", "coding")({"constant": 0}),
        "file: plain: its step has an unknown field 'coding'",
    ),
    "a constant with bytes": (
        at(PLAIN, "parts", "codes", "coding")({"constant": 0}),
        "file: plain: its codes has 12 bytes where shape [3, 4] needs 0",
    ),
    "a checksum beyond 32 bits": (
        at(PLAIN, "parts", "codes", "crc32")(2**32),
        f"file: plain: the crc32 of its codes is not an integer from 0 to {2**32 - 1}",
    ),
    "an offset between boundaries": (
        at(PLAIN, "parts", "codes", "offset")(129),
        "file: plain: its codes begins at byte 129 of the data, not at byte 128",
    ),
    "an overlap": (
        at(PLAIN, "parts", "step", "offset")(128),
        "file: plain: its step begins at byte 128 of the data, not at byte 192",
    ),
    "a missing tensor at the end": (
        lambda index: [index["tensors"].pop() for _ in range(2)],
        f"file: its data has {len(FIRST_DATA):,} bytes, of which its index accounts for 326",
    ),
    "a part that has no checksum": (
        lambda index: index["tensors"][PLAIN]["parts"]["step"].pop("crc32"),
        "file: plain: its step lacks 'crc32'",
    ),
    "a checksum of all": (at(PLAIN, "crc32")(1), "file: plain: its entry has an unknown field 'crc32'"),
    "classes": (
        at(PLAIN, "parts", "classes")({}),
        "file: plain: the object of its parts has an unknown field 'classes'",
    ),
}


def nothing_in_classes(entry: Json) -> Json:
    """Two rows without a number, each in a class of its own."""
    parts = {"classes": {}, "codes 0": {"rows": 1}, "codes 1": {"rows": 1}, "step": {}}
    return entry | {"shape": [2, 0], "view": {"split": [2, 0], "rows": [0]}, "parts": parts}


# What parts say, in version 2.
SECOND_LIES: dict[str, tuple[Edit, str]] = {
    "an offset": (at(HALF, "parts", "values", "offset")(0), "file: half: its values has an unknown field 'offset'"),
    "a length that follows from the shape": (
        at(HALF, "parts", "values", "length")(6),
        "file: half: its values has an unknown field 'length'",
    ),
    "a length of plain codes": (
        at(PLAIN, "parts", "codes", "length")(12),
        "file: plain: its codes has a length, which coded parts have, and only they",
    ),
    "a length of equal codes": (
        at(WIDE, "parts", "codes", "length")(0),
        "file: wide: its codes has a length, which coded parts have, and only they",
    ),
    "no length of coded codes": (
        lambda index: index["tensors"][CODED]["parts"]["codes"].pop("length"),
        "file: coded: its codes lacks a length, which coded parts have, and only they",
    ),
    "a length that is none": (
        at(CODED, "parts", "codes", "length")(-1),
        f"file: coded: the length of its codes is not an integer from 0 to {2**63 - 1}",
    ),
    "no checksum": (
        lambda index: index["tensors"][PLAIN].pop("crc32"),
        "file: plain: its entry lacks 'crc32'",
    ),
    "a checksum beyond 32 bits": (
        at(PLAIN, "crc32")(2**32),
        f"file: plain: its crc32 is not an integer from 0 to {2**32 - 1}",
    ),
    "a checksum of one part": (
        at(PLAIN, "parts", "codes", "crc32")(1),
        "file: plain: its codes has an unknown field 'crc32'",
    ),
    "another shape": (
        at(NONE, "shape")([100, 500]),
        f"file: none: its values ends at byte {start_of(INDEX.entries[COUNT].end, 50_000) + 50_000:,} of the "
        f"data, which has {len(DATA):,}",
    ),
    "a missing tensor at the end": (
        lambda index: index["tensors"].pop(),
        f"file: its data has {len(DATA):,} bytes, of which its index accounts for {INDEX.entries[SCALED].end}",
    ),
    "coded steps without a base": (
        lambda index: index["tensors"][CLASSED]["parts"]["step"].pop("base"),
        "file: classed: its step is coded but has no base",
    ),
    "a base that is none": (
        at(SCALED, "parts", "step", "base")(1.0),
        "file: scaled: the base of its step is not an integer from -1008 to 1023",
    ),
    "a base that is a truth": (
        at(SCALED, "parts", "step", "base")(True),
        "file: scaled: the base of its step is not an integer from -1008 to 1023",
    ),
    "a base too high": (
        at(SCALED, "parts", "step", "base")(1024),
        "file: scaled: the base of its step is not an integer from -1008 to 1023",
    ),
    "a base too low": (
        at(SCALED, "parts", "step", "base")(-1009),
        "file: scaled: the base of its step is not an integer from -1008 to 1023",
    ),
    "a base of codes": (
        at(SCALED, "parts", "codes", "base")(0),
        "file: scaled: its codes has an unknown field 'base'",
    ),
    "an unknown coding of steps": (
        at(SCALED, "parts", "step", "coding")({"per_symbol": 7}),
        "file: scaled: {'per_symbol': 7} is not a coding",
    ),
    "rows of all codes": (
        at(PLAIN, "parts", "codes", "rows")(3),
        "file: plain: its codes has an unknown field 'rows'",
    ),
    "classes of plain values": (
        at(HALF, "parts", "classes")({}),
        "file: half: the object of its parts has an unknown field 'classes'",
    ),
    "classes beside all codes": (
        at(PLAIN, "parts", "classes")({}),
        "file: plain: the object of its parts lacks 'codes 0'",
    ),
    "a class without rows": (
        lambda index: index["tensors"][CLASSED]["parts"]["codes 0"].pop("rows"),
        "file: classed: its codes 0 lacks 'rows'",
    ),
    "a class missing": (
        lambda index: index["tensors"][CLASSED]["parts"].pop("codes 0"),
        "file: classed: the object of its parts lacks 'codes 0'",
    ),
    "three classes": (
        at(CLASSED, "parts", "codes 2")({"rows": 1}),
        "file: classed: the object of its parts has an unknown field 'codes 2'",
    ),
    "a fourth of three classes": (
        at(CLASSED, "parts", "codes 3")({"rows": 1}),
        "file: classed: the object of its parts lacks 'codes 2'",
    ),
    "too few rows": (
        at(CLASSED, "parts", "codes 0", "rows")(89),
        "file: classed: its classes have [89, 30] rows where shape [60, 2, 3] has 120",
    ),
    "classes of nothing": (
        lambda index: index["tensors"].__setitem__(CLASSED, nothing_in_classes(index["tensors"][CLASSED])),
        "file: classed: its classes have [1, 1] rows where shape [2, 0] has 0",
    ),
    "an empty class": (
        lambda index: [
            index["tensors"][CLASSED]["parts"][name].update(rows=rows)
            for name, rows in (("codes 0", 120), ("codes 1", 0))
        ],
        "file: classed: its classes have [120, 0] rows where shape [60, 2, 3] has 120",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused(lie: str) -> None:
    edit, words = LIES[lie]
    for known, data in ((INDEX.to_json(), DATA), (first_json(), FIRST_DATA)):
        with pytest.raises(CorruptError) as error:
            parse_record(edited(edit, known), data)
        assert str(error.value) == f"{words}\n  {DAMAGED}"


@pytest.mark.parametrize("lie", FIRST_LIES)
def test_parts_of_version_1_that_lie_are_refused(lie: str) -> None:
    edit, words = FIRST_LIES[lie]
    with pytest.raises(CorruptError) as error:
        parse_record(edited(edit, first_json()), FIRST_DATA)
    assert str(error.value) == f"{words}\n  {DAMAGED}"


@pytest.mark.parametrize("lie", SECOND_LIES)
def test_parts_of_version_2_that_lie_are_refused(lie: str) -> None:
    edit, words = SECOND_LIES[lie]
    with pytest.raises(CorruptError) as error:
        parse_record(edited(edit))
    assert str(error.value) == f"{words}\n  {DAMAGED}"


def test_a_newer_version_is_refused_before_anything_else() -> None:
    with pytest.raises(VersionError) as error:
        parse_record(edited(lambda index: index.update(pared=4, novelty={})))
    assert str(error.value) == (
        "file: has version 4 of the format, and this pared reads up to 3\n"
        "  Install a newer pared: pip install --upgrade pared"
    )


def test_codes_beyond_their_bytes_are_a_bomb() -> None:
    def edit(index: Json) -> None:
        index["tensors"][CODED].update(shape=[4, 2**20])

    length = INDEX.entries[CODED].parts["codes"].length
    with pytest.raises(UnsafeError) as error:
        parse_record(edited(edit))
    assert str(error.value) == (
        f"file: coded: declares 4,194,304 codes, and the {length} bytes of its codes hold at most {length * 32:,}"
        f"\n  {UNSAFE}"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("codes 0", "declares 3,145,638 codes, and the {} bytes of its codes 0 hold at most {:,}"),
        ("classes", "declares 1,048,576 codes, and the {} bytes of its classes hold at most {:,}"),
        ("step", "declares 1,048,576 codes, and the {} bytes of its step hold at most {:,}"),
    ],
)
def test_classes_and_steps_beyond_their_bytes_are_bombs(name: str, words: str) -> None:
    """A tensor of 2^20 rows, in which all parts but one are constant."""

    def edit(index: Json) -> None:
        entry = index["tensors"][CLASSED]
        entry.update(shape=[2**19, 2, 3], view={"split": [2**19, 2, 3], "rows": [0, 1]})
        kept = entry["parts"][name]
        for part in entry["parts"].values():
            if part is not kept:
                part.pop("length", None)
                part["coding"] = {"constant": 0}
        entry["parts"]["codes 0"]["rows"] = 2**20 - 30

    part = INDEX.entries[CLASSED].parts[name]
    assert part.coding is not None
    with pytest.raises(UnsafeError) as error:
        parse_record(edited(edit))
    expected = words.format(part.length, part.length * 8 * part.coding.per_symbol)
    assert str(error.value) == f"file: classed: {expected}\n  {UNSAFE}"


def test_classes_and_steps_without_bytes_are_counted() -> None:
    """With r rows of two columns: r classes, 2 r codes and r steps."""

    def equal(rows: int) -> Index:
        nothing = {"coding": Coding(constant=0)}
        halves = {f"codes_{i}": (b"", {**nothing, "rows": rows // 2}) for i in range(2)}
        step = (b"", {**nothing, "base": 0})
        fmt = {"tag": "grid", "codes": "int8"}
        view = ((rows, 2), (0,))
        return Index((Writer(2).entry("a", (rows, 2), view, fmt, classes=(b"", nothing), **halves, step=step),))

    assert parse_record(equal(2**26).to_bytes(), b"") == equal(2**26)
    with pytest.raises(UnsafeError) as error:
        parse_record(equal(2**26 + 2).to_bytes(), b"")
    assert str(error.value) == f"file: a: with it, more than 268,435,456 codes take no bytes\n  {UNSAFE}"


def test_too_many_codes_without_bytes_are_a_bomb() -> None:
    def edit(index: Json) -> None:
        index["tensors"][WIDE].update(shape=[6, 2**26], view={"split": [6, 2**26], "rows": [0]})

    with pytest.raises(UnsafeError) as error:
        parse_record(edited(edit))
    assert str(error.value) == f"file: wide: with it, more than 268,435,456 codes take no bytes\n  {UNSAFE}"


def test_an_index_that_inflates_without_bound_is_a_bomb() -> None:
    with pytest.raises(UnsafeError) as error:
        parse_record(zlib.compress(b" " * (8 << 20)), b"")
    assert re.fullmatch(
        r"file: its index inflates to more than 1,\d\d\d,\d\d\d bytes\n  " + re.escape(UNSAFE), str(error.value)
    )


RECORDS = {
    "no zlib stream": (
        b"{}",
        "its index does not inflate: Error -3 while decompressing data: incorrect header check",
    ),
    "half a stream": (INDEX.to_bytes()[:-20], "its index is truncated"),
    "bytes behind it": (INDEX.to_bytes() + b"x", "its index has bytes after its end"),
    "no JSON": (
        zlib.compress(b"{]"),
        "its index is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    "a list": (zlib.compress(b"[]"), "its index is not an object"),
    "a key twice": (
        zlib.compress(b'{"pared":1,"pared":1}'),
        "its index is not valid JSON: an object has the same key twice",
    ),
    "not a number": (zlib.compress(b'{"pared":NaN}'), "its index is not valid JSON: NaN is not a number"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_that_is_no_index_is_refused(kind: str) -> None:
    record, words = RECORDS[kind]
    with pytest.raises(CorruptError) as error:
        parse_record(record)
    assert str(error.value) == f"file: {words}\n  {DAMAGED}"


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b'"' + b"9" * 9000, b"9" * 9000])
def test_json_that_breaks_parsers_is_refused(text: bytes) -> None:
    with pytest.raises(CorruptError, match="its index is no"):
        parse_record(zlib.compress(text))


def test_padding_that_is_not_zero_is_refused() -> None:
    data = bytearray(FIRST_DATA)
    data[127] = 1
    with pytest.raises(CorruptError) as error:
        parse_record(edited(lambda _: None, first_json()), bytes(data))
    assert str(error.value) == f"file: plain: the padding before its codes is not zero\n  {DAMAGED}"
    data = bytearray(DATA)
    data[INDEX.entries[-1].parts["values"].offset - 1] = 1
    with pytest.raises(CorruptError) as error:
        parse_record(INDEX.to_bytes(), bytes(data))
    assert str(error.value) == f"file: large: the padding before its values is not zero\n  {DAMAGED}"


@pytest.mark.parametrize("cut", [1, 50, 4500, len(DATA)])
def test_data_that_are_cut_are_refused(cut: int) -> None:
    with pytest.raises(CorruptError, match=r"ends at byte [\d,]+ of the data, which has [\d,]+"):
        parse_record(INDEX.to_bytes(), DATA[: len(DATA) - cut])
    with pytest.raises(CorruptError, match=r"ends at byte [\d,]+ of the data, which has [\d,]+"):
        parse_record(edited(lambda _: None, first_json()), FIRST_DATA[: max(0, 326 - cut)])


# --- a container that lies


def members() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(PT)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(content: dict[str, bytes], compression: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, value in content.items():
            archive.writestr(name, value)
        archive.comment = comment
    return file.getvalue()


def compressed(name: str) -> bytes:
    """The zip with one member deflated."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key, value in members().items():
            archive.writestr(key, value, zipfile.ZIP_DEFLATED if key == name else zipfile.ZIP_STORED)
    return file.getvalue()


def without_member(name: str) -> bytes:
    return zipped({key: value for key, value in members().items() if key != name})


def with_member(name: str, value: bytes) -> bytes:
    return zipped(members() | {name: value})


def flipped(needle: bytes) -> bytes:
    position = PT.index(needle)
    return PT[:position] + bytes([PT[position] ^ 1]) + PT[position + 1 :]


def header(edit: Callable[[Json], object], tail: bytes = b"") -> bytes:
    length = struct.unpack("<Q", SAFE[:8])[0]
    known = json.loads(SAFE[8 : 8 + length])
    edit(known)
    text = json.dumps(known).encode()
    return struct.pack("<Q", len(text)) + text + SAFE[8 + length :] + tail


FILES: dict[str, tuple[bytes, type[FileError], str]] = {
    "a truncated zip": (
        PT[:-30],
        CorruptError,
        "its zip directory cannot be read (File is not a zip file): it is truncated or damaged",
    ),
    "a missing record": (without_member("archive/data/1"), CorruptError, "its member 'data/1' is missing"),
    "a missing pickle": (without_member("archive/data.pkl"), CorruptError, "its member 'archive/data.pkl' is missing"),
    "an extra record": (
        with_member("archive/data/2", b""),
        CorruptError,
        "it has a member 'data/2', which no artifact has",
    ),
    "an extra member": (
        with_member("evil.py", b"import os"),
        CorruptError,
        "it has a member 'evil.py', which no artifact has",
    ),
    "compressed members": (
        zipped(members(), zipfile.ZIP_DEFLATED),
        FileError,
        "is a torch file, not an artifact of pared",
    ),
    "compressed data": (
        compressed("archive/data/1"),
        CorruptError,
        "its member 'data/1' is compressed or encrypted, which torch never does",
    ),
    "a large note": (
        with_member("archive/version", b"3" * 5000),
        CorruptError,
        "its member 'version' has 5,000 bytes, more than torch writes",
    ),
    "a flipped index": (
        flipped(INDEX.to_bytes()[50:80]),
        CorruptError,
        "the checksum of its member 'archive/data/0' does not match",
    ),
    "a flipped pickle": (
        flipped(b"storage"),
        CorruptError,
        "the checksum of its member 'archive/data.pkl' does not match",
    ),
    "a comment": (
        zipped(members(), comment=b"hidden"),
        CorruptError,
        "it has bytes that do not belong to any member of its archive",
    ),
    "a state dict": (pt(b"", b"").replace(b"index", b"shape"), FileError, "is a torch file, not an artifact of pared"),
    "another zip": (zipped({"a.txt": b"hello"}), FileError, "is a zip archive, not an artifact of pared"),
    "a web page": (b"<!DOCTYPE html>", FileError, "is a web page or an XML file, not an artifact of pared"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\n",
        FileError,
        "is a Git LFS pointer in the place of the file, not an artifact of pared",
    ),
    "text": (b"hello", FileError, "is of an unknown kind, not an artifact of pared"),
    "another safetensors": (
        safetensors.numpy.save({"index": np.zeros(1, np.uint8)}),
        FileError,
        "is a .safetensors file, not an artifact of pared",
    ),
    "a safetensors record missing": (
        safetensors.numpy.save({"index": np.zeros(1, np.uint8)}, {"format": "pared"}),
        CorruptError,
        "its tensor 'data' is missing",
    ),
    "a safetensors record of floats": (
        safetensors.numpy.save({"index": np.zeros(1, np.uint8), "data": np.zeros(1, np.float32)}, {"format": "pared"}),
        CorruptError,
        "it has a tensor 'data' of F32, which no artifact has",
    ),
    "a safetensors record too many": (
        safetensors.numpy.save({name: np.zeros(1, np.uint8) for name in ("index", "data", "x")}, {"format": "pared"}),
        CorruptError,
        "it has a tensor 'x' of U8, which no artifact has",
    ),
    "safetensors and more": (
        SAFE + b"more",
        CorruptError,
        f"its tensors end at byte {len(SAFE):,}, and the file has {len(SAFE) + 4:,}: "
        "the rest does not belong to any tensor",
    ),
    "half of safetensors": (
        SAFE[:-10],
        CorruptError,
        f"its tensors end at byte {len(SAFE):,}, and the file has {len(SAFE) - 10:,}: it is truncated",
    ),
    "half a header": (SAFE[:100], CorruptError, "its header has 192 bytes, and the file 100: it is truncated"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_container_that_lies_is_refused(kind: str) -> None:
    file, error_type, words = FILES[kind]
    with pytest.raises(FileError) as error:
        parse(file)
    assert type(error.value) is error_type
    assert str(error.value).splitlines()[0] == f"file: {words}"


def test_bytes_between_members_are_refused() -> None:
    """A zip may hide anything between its members; the directory then points behind it."""
    end = PT.index(b"PK\x01\x02")
    shifted = PT[:end] + b"hidden" + PT[end:]
    eocd = shifted.rindex(b"PK\x05\x06")
    offset = struct.unpack_from("<I", shifted, eocd + 16)[0]
    zip64 = shifted.rindex(b"PK\x06\x06")
    moved = bytearray(shifted)
    struct.pack_into("<I", moved, eocd + 16, offset + 6)
    struct.pack_into("<Q", moved, zip64 + 48, offset + 6)
    struct.pack_into("<Q", moved, shifted.rindex(b"PK\x06\x07") + 8, zip64)
    with pytest.raises(CorruptError) as error:
        parse(bytes(moved))
    assert error.value.what == "it has bytes that do not belong to any member of its archive"


def central(field: int, code: str, value: int, member: str = "archive/data/1") -> bytes:
    """The zip with one field of its directory changed."""
    file = bytearray(PT)
    entry = file.rindex(member.encode()) - 46
    struct.pack_into(code, file, entry + field, value)
    return bytes(file)


DIRECTORY = {
    "two sizes": (central(24, "<I", 5), "its member 'archive/data/1' has two sizes"),
    "a member beyond the file": (
        central(42, "<I", 10**6),
        "its member 'archive/data/1' begins outside the file",
    ),
    "a member that is another": (
        central(42, "<I", 0),
        "its member 'archive/data/1' and the archive's directory contradict each other",
    ),
    "another method": (
        central(10, "<H", 8),
        "its member 'archive/data/1' and the archive's directory contradict each other",
    ),
    "an overlap": (
        central(20, "<Q", (10**4 << 32) | 10**4),
        "its member 'archive/data/1' reaches into what follows it",
    ),
}


@pytest.mark.parametrize("kind", DIRECTORY)
def test_a_directory_that_lies_is_refused(kind: str) -> None:
    file, words = DIRECTORY[kind]
    with pytest.raises(CorruptError) as error:
        parse(file)
    assert error.value.what == words


@settings(deadline=None, max_examples=400)
@given(st.data(), st.sampled_from([PT, SAFE]))
@pytest.mark.slow
def test_mutated_files_are_refused_or_read_right(draw: st.DataObject, file: bytes) -> None:
    """Whatever is flipped, cut or inserted: an error of ours, or an index that is sound for the data there are."""
    mutated = draw.draw(mutations(file, most=3))
    try:
        found = parse(mutated)
    except ParedError:
        return
    assert found == INDEX


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=4) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in inside for place in places(inner, (*path, key)))]


PLACES = [(version, path) for version in (1, 2) for path in places((first_json, INDEX.to_json)[version - 1]())[1:]]


@settings(deadline=None, max_examples=600)
@given(st.sampled_from(PLACES), json_values)
@pytest.mark.slow
def test_any_value_anywhere_in_an_index_is_refused_or_sound(where: tuple[int, tuple[Any, ...]], value: Any) -> None:
    version, path = where
    known, data = (INDEX.to_json(), DATA) if version == 2 else (first_json(), FIRST_DATA)
    place: Any = known
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    try:
        found = parse_record(zlib.compress(json.dumps(known).encode()), data)
    except ParedError:
        return
    end = 0
    for entry in found.entries:
        for part in entry.parts.values():
            assert part.offset == start_of(end, part.length, version)
            end = part.end
    assert end == len(data)


# --- writing


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    write_atomic(path, lambda file: file.write(b"first"))
    write_atomic(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_the_usual_permissions_are_given(tmp_path: Path) -> None:
    write_atomic(tmp_path / "ours", lambda file: file.write(b""))
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fails)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error_that_names_the_directory(tmp_path: Path) -> None:
    def full(_: BinaryIO) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError) as error:
        write_atomic(tmp_path / "file", full)
    assert str(error.value) == (
        f"{tmp_path}: cannot be written: No space left on device\n"
        "  Choose another directory, or change its permissions or free space."
    )
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_directory_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError) as error:
        make_directory(tmp_path / "file" / "below")
    assert error.value.where == str(tmp_path / "file" / "below")
    assert error.value.what == "cannot be written: Not a directory"
    make_directory(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    words = {
        "missing": "cannot be read: No such file or directory",
        "empty": "is empty",
        "pipe": "is not a regular file",
        ".": "is a directory",
    }
    for name, what in words.items():
        with pytest.raises(FileError) as error, open_records(tmp_path / name):
            pass
        assert error.value.what == what


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
