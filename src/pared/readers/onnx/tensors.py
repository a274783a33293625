"""Tensors of ONNX models, whose numbers are in the model itself or in a file beside it."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from pared.errors import FileError
from pared.files.checks import Place
from pared.files.disk import File
from pared.files.memory_limit import MemoryLimit
from pared.formats.dtypes import TYPES
from pared.readers.listing import ListedTensor, Storage
from pared.readers.onnx.protobuf import Value, fields, numbers, unpack_varints

# Fields of TensorProto and of the entries of its external data, by number: onnx.proto.
_DIMS, _TYPE, _TEXTS, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 6, 8, 9, 13, 14
_FLOATS, _INT32S, _INT64S, _DOUBLES, _UINT64S = 4, 5, 7, 10, 11
_KEY, _VALUE = 1, 2
_OUTSIDE: Final = 1  # the location of numbers in another file

_MOST_DIMENSIONS: Final = 64
_HELD_NBYTES: Final = 3000
_PART_NBYTES: Final = 300

# The element types by number.
_STRING: Final = "string"
_NAMES: Final[Mapping[int, str]] = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: _STRING, 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16",
    17: "float8_e4m3fn", 18: "float8_e4m3fnuz", 19: "float8_e5m2", 20: "float8_e5m2fnuz", 21: "uint4", 22: "int4",
    23: "float4_e2m1", 24: "float8_e8m0fnu", 25: "uint2", 26: "int2",
}  # fmt: skip
# The field in which a tensor has its numbers if they are not raw, where that is not `_INT32S`.
_TYPED: Final[Mapping[str, int]] = {
    "float32": _FLOATS, "complex64": _FLOATS, "float64": _DOUBLES, "complex128": _DOUBLES, "int64": _INT64S,
    "uint32": _UINT64S, "uint64": _UINT64S, _STRING: _TEXTS,
}  # fmt: skip


@dataclass
class Tensors:
    """Collects the tensors of a model.

    Args:
        file: the model.
        memory: how much listing it may take.
        listed: the tensors so far.
        storages: the storages of their numbers; the key of one in another file begins with that file's name.
        inside: the size of all numbers in the model file itself.
        outside: spans of numbers in other files as (offset, length), by file name.
    """

    file: File
    memory: MemoryLimit
    listed: list[ListedTensor] = field(default_factory=list)
    storages: dict[str, Storage] = field(default_factory=dict)
    inside: int = 0
    outside: dict[str, set[tuple[int, int]]] = field(default_factory=dict)
    _names: dict[str, int] = field(default_factory=dict)

    def add(self, data: memoryview, name: str) -> None:
        """List a tensor.

        Args:
            data: its message.
            name: its name; "" to use the name in the message.
        """
        self.memory.take(_HELD_NBYTES)
        at = Place(self.file.where)
        parts: dict[int, list[Value]] = {}
        for number, value in fields(data, at):
            self.memory.take(_PART_NBYTES)
            parts.setdefault(number, []).append(value)
        name = self._unique(name or text_of(parts.get(_NAME, [0])[-1], at) or "(tensor)")
        at = Place(f"{self.file.where}: {name}")
        shape = _shape(parts.get(_DIMS, []), at)
        kind = parts.get(_TYPE, [0])[-1]
        dtype = _NAMES.get(kind) if isinstance(kind, int) else None
        if dtype is None:
            at.fail("its element type is unknown")
        bits = 0 if dtype == _STRING else TYPES[dtype].bits
        nbytes = -(-math.prod(shape) * bits // 8)
        if parts.get(_LOCATION, [0])[-1] == _OUTSIDE:
            key, storage = self._from_outside(parts.get(_EXTERNAL, []), nbytes, at)
        else:
            key, storage = name, _inline(parts, dtype, nbytes, self.memory, at)
            self.inside += storage.nbytes
        self.storages[key] = storage
        self.listed.append(ListedTensor(name, dtype, shape, nbytes if bits else storage.nbytes, key))

    def _unique(self, name: str) -> str:
        """The name, with a number appended if it is taken: subgraphs may repeat names."""
        while name in self._names:
            self._names[name] += 1
            name = f"{name}#{self._names[name]}"
        self._names[name] = 1
        return name

    def _from_outside(self, entries: Sequence[Value], nbytes: int, at: Place) -> tuple[str, Storage]:
        known = dict(_entry(entry, at) for entry in entries)
        location = known.get("location", "")
        path = outside_path(self.file, location, at)
        offset = _whole(known.get("offset", "0"), "the offset of its data", at)
        length = _whole(known.get("length", str(nbytes)), "the length of its data", at)
        if nbytes != length:
            at.fail(f"its data has {length:,} bytes where its shape needs {nbytes:,}")
        if offset + length > (size := path.stat().st_size):
            at.fail(f"its data ends at byte {offset + length:,} of {location[:80]!r}, which has {size:,}")
        self.outside.setdefault(location, set()).add((offset, length))
        return f"{location}@{offset}+{length}", Storage(length, partial(_mapped, path, offset, length))


def text_of(value: Value, at: Place) -> str:
    """The text in a field; "" if it is a number."""
    try:
        return "" if isinstance(value, int) else bytes(value[:4096]).decode("utf-8")
    except UnicodeDecodeError:
        at.fail("a name in it is not valid text")


def outside_path(file: File, location: str, at: Place) -> Path:
    """The path of a file beside the model that the model refers to.

    Raises:
        FileError: it is missing.
        CorruptError: it is outside the model's folder.
    """
    if file.path is None:
        at.fail("its data is in another file, and a model in memory has no files beside it")
    folder = file.path.parent
    if not location or "\0" in location or Path(location).is_absolute() or ".." in Path(location).parts:
        at.fail(f"its data is said to be in {location[:80]!r}, which is not a path inside the model's folder")
    try:
        real = (folder / location).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise FileError(
            f"its data is in {location[:80]!r}, which is missing",
            where=at.place,
            remedy="Put that file beside the model.",
        ) from error
    # In a cache of links to real files, the model is such a link itself.
    homes = (folder.resolve(), file.path.resolve().parent)
    if not real.is_file() or not any(real.is_relative_to(home) for home in homes):
        at.fail(f"its data is said to be in {location[:80]!r}, which leads out of the model's folder")
    return real


def _shape(values: Sequence[Value], at: Place) -> tuple[int, ...]:
    sizes: list[int] = []
    for value in values:
        for size in numbers(value, at):
            sizes.append(size)
            if len(sizes) > _MOST_DIMENSIONS:
                at.fail("its shape is larger than any tensor")
    return at.shape(sizes, "shape")


def _entry(data: Value, at: Place) -> tuple[str, str]:
    parts = {} if isinstance(data, int) else dict(fields(data, at))
    return text_of(parts.get(_KEY, 0), at), text_of(parts.get(_VALUE, 0), at)


def _whole(text: str, what: str, at: Place) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else at.fail(f"{what} is not a number")


def _mapped(path: Path, offset: int, length: int) -> memoryview:
    if not length:
        return memoryview(b"")
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    # The mapping lives as long as the view.
    return memoryview(mapped)[offset : offset + length]


def _inline(parts: Mapping[int, list[Value]], dtype: str, nbytes: int, memory: MemoryLimit, at: Place) -> Storage:
    """The storage of numbers in the message itself: raw, or in a typed field."""
    raw = _joined(parts.get(_RAW, []), at)
    place = _TYPED.get(dtype, _INT32S)
    typed = parts.get(place, [])
    if raw and dtype != _STRING:
        return _plain(raw, nbytes, at)
    if dtype == _STRING:
        return Storage(sum(len(value) for value in typed if not isinstance(value, int)), coded=True)
    if place in (_FLOATS, _DOUBLES):
        return _plain(_joined(typed, at), nbytes, at)
    size = max(1, TYPES[dtype].bits // 8)
    count, stored = nbytes // size, sum(1 if isinstance(value, int) else len(value) for value in typed)
    if count > stored:
        at.fail(f"it has {stored:,} bytes for {count:,} numbers")
    content = partial(_unpacked, typed, f"<u{size}", count, at) if memory.affords(nbytes + stored) else None
    return Storage(stored, content, coded=True)


def _plain(content: memoryview, nbytes: int, at: Place) -> Storage:
    if len(content) != nbytes:
        at.fail(f"it has {len(content):,} bytes of numbers where its shape needs {nbytes:,}")
    return Storage(nbytes, lambda: content)


def _joined(values: Sequence[Value], at: Place) -> memoryview:
    chunks = [value for value in values if not isinstance(value, int)]
    if len(chunks) != len(values):
        at.fail("its numbers are of another type than declared")
    return chunks[0] if len(chunks) == 1 else memoryview(b"".join(chunks))


def _unpacked(values: Sequence[Value], dtype: str, count: int, at: Place) -> memoryview:
    return unpack_varints(values, dtype, count, at).view(np.uint8).data
