"""Artifacts of the first two versions of the format, with every kind of entry, and edits that make their index lie."""

import copy
import io
import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pared.artifact.envelope import Records, open_records
from pared.artifact.index import Entry, Index, Part, start_of
from pared.artifact.parse import parse_index
from pared.files.safetensors_file import write_safetensors
from pared.formats import entropy
from pared.formats.entropy import Coding

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
    known = copy.deepcopy(FIRST.to_json())
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
    write_safetensors(file, index, (data,), len(data))
    return file.getvalue()


PT, SAFE = pt(INDEX.to_bytes(), DATA), safe(INDEX.to_bytes(), DATA)


def parse(file: bytes) -> Index:
    with open_records(file, "file") as records:
        return parse_index(records)


def parse_record(record: bytes, data: bytes = DATA) -> Index:
    return parse_index(Records("file", 0, record, memoryview(data)))


def edited(edit: Edit, known: Json | None = None) -> bytes:
    known = copy.deepcopy(INDEX.to_json()) if known is None else known  # which shares values with the index
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
