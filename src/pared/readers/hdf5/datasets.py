"""HDF5 files, as Keras writes them (`.h5`): datasets in groups. Attributes and other metadata are not looked into."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from pared.files.checks import Place
from pared.files.disk import File
from pared.readers.hdf5.headers import (
    DATASPACE,
    DATATYPE,
    LAYOUT,
    UNDEFINED,
    Bytes,
    Message,
    links,
    messages,
    tree_leaves,
)
from pared.readers.listing import Held, Listing, Note, Storage, unknown

_MAGIC: Final = b"\x89HDF\r\n\x1a\n"
_DEEPEST: Final = 100
_HELD_NBYTES: Final = 2500
_COMPACT, _CONTIGUOUS, _CHUNKED = 0, 1, 2
_INTEGER, _FLOAT, _ENUM = 0, 1, 8


@dataclass(frozen=True)
class _Data:
    """A dataset's numbers: where they are and how many bytes; chunked ones are listed but not read."""

    begin: int
    nbytes: int
    plain: bool


def is_hdf5(file: File) -> bool:
    """Whether the file begins as HDF5."""
    return bytes(file.data[: len(_MAGIC)]) == _MAGIC


def read_hdf5(file: File) -> Listing:
    """The datasets of an HDF5 file, with their paths: "dense/kernel:0".

    Raises:
        FileError: it uses other widths of addresses than every writer does.
        CorruptError: it contradicts itself.
        UnsafeError: it has more objects than its size allows.
    """
    source = Bytes(file.data, Place(file.where), file.allowance)
    tensors: list[Held] = []
    storages: dict[str, Storage] = {}
    spans: set[tuple[int, int]] = set()
    for name, found in _datasets(source, _root(file, source)):
        at = Place(f"{file.where}: {name}")
        source.allowance.take(_HELD_NBYTES)
        held, data, item = _dataset(source, name, found, at)
        tensors.append(held)
        if held.storage is None or data is None:
            continue
        content = partial(_content, file, data, item) if data.plain else None
        storages[held.storage] = Storage(data.nbytes, content, coded=not data.plain)
        if data.plain:
            spans.add((data.begin, data.nbytes))
    _check_apart(spans, Place(file.where))
    rest = len(file.data) - sum(storage.nbytes for storage in storages.values())
    if rest < 0:
        source.at.fail("its datasets take more bytes than it has")
    return Listing(tuple(tensors), storages, {"(metadata)": Note(rest)}, kind="an HDF5 file")


def _root(file: File, source: Bytes) -> int:
    """The address of the first group."""
    version = source.number(8, 1)
    if version in (0, 1):
        widths, base, root = source.piece(13, 2), 24 + 4 * version, 24 + 4 * version + 40
    elif version in (2, 3):
        widths, base, root = source.piece(9, 2), 12, 36
    else:
        raise unknown(file, f"an HDF5 file with a superblock of version {version}")
    if widths != b"\x08\x08" or source.number(base, 8):
        raise unknown(file, "an HDF5 file with unusual addresses")
    return source.number(root, 8)


def _datasets(source: Bytes, root: int) -> Iterator[tuple[str, list[Message]]]:
    """All datasets with their paths; one that has several paths is given at each."""
    known: dict[int, list[Message]] = {}
    waiting = [("", root, 0)]
    while waiting:
        path, address, depth = waiting.pop()
        source.allowance.take(len(path) + _HELD_NBYTES // 4)
        again = address in known
        found = known[address] if again else known.setdefault(address, messages(source, address))
        if any(message.kind == LAYOUT for message in found):
            yield path, found
        elif not again:
            if depth == _DEEPEST:
                source.at.fail("its groups are nested deeper than any model's")
            inside = [(f"{path}/{name}" if path else name, a, depth + 1) for name, a in links(source, found)]
            waiting += reversed(inside)


def _dataset(source: Bytes, name: str, found: list[Message], at: Place) -> tuple[Held, _Data | None, int]:
    """A dataset, its numbers, and the bytes of an element whose highest byte comes first, or 1."""
    by_kind = {message.kind: message for message in found}
    if DATASPACE not in by_kind or DATATYPE not in by_kind:
        at.fail("it lacks a shape or a type")
    shape = _shape(source, by_kind[DATASPACE].begin, at)
    dtype, size, swapped = _type(source, by_kind[DATATYPE])
    nbytes = math.prod(shape) * size
    data = _layout(source, by_kind[LAYOUT].begin, len(shape), at)
    if data is None:
        return Held(name, dtype, shape, nbytes, None), None, 1
    if by_kind[DATATYPE].shared:
        nbytes = data.nbytes
    if data.plain and data.nbytes != nbytes:
        at.fail(f"it has {data.nbytes:,} bytes where its shape needs {nbytes:,}")
    return Held(name, dtype, shape, nbytes, f"at {data.begin}"), data, size if swapped else 1


def _shape(source: Bytes, begin: int, at: Place) -> tuple[int, ...]:
    version, rank = source.number(begin, 1), source.number(begin + 1, 1)
    start = begin + (8 if version == 1 else 4)
    return at.shape([source.number(start + 8 * i, 8) for i in range(rank)], "shape")


def _type(source: Bytes, message: Message) -> tuple[str, int, bool]:
    """The type in torch's words where it has one, the bytes of an element, and whether the highest comes first."""
    if message.shared:  # it is an object of its own, which no writer of weights makes
        return "(named type)", 0, False
    kind, flags = source.number(message.begin, 1) & 15, source.number(message.begin + 1, 3)
    size = source.number(message.begin + 4, 4)
    if kind == _INTEGER and size in (1, 2, 4, 8):
        return f"{'' if flags & 8 else 'u'}int{8 * size}", size, bool(flags & 1)
    if kind == _FLOAT and size in (2, 4, 8):
        exponent = source.number(message.begin + 13, 1)
        return "bfloat16" if size == 2 and exponent == 8 else f"float{8 * size}", size, bool(flags & 1)
    if kind == _ENUM and size == 1:
        return "bool", 1, False  # as h5py writes it
    return {3: "string", 6: "compound", 9: "(texts)"}.get(kind, f"(type {kind})"), size, False


def _layout(source: Bytes, begin: int, rank: int, at: Place) -> _Data | None:
    """Where the numbers are; None if there are none."""
    version, kind = source.number(begin, 1), source.number(begin + 1, 1)
    if version not in (3, 4):
        at.fail(f"its layout is of version {version}, which is not known here")
    if kind == _COMPACT:
        return _Data(begin + 4, source.number(begin + 2, 2), plain=True)
    if kind == _CONTIGUOUS:
        address, nbytes = source.number(begin + 2, 8), source.number(begin + 10, 8)
        if address == UNDEFINED:
            return None
        if address + nbytes > len(source.data):
            at.fail("it ends outside the file: it is truncated")
        return _Data(address, nbytes, plain=True)
    if kind == _CHUNKED and version == 3:
        return _chunks(source, begin, rank)
    return _Data(begin, 0, plain=False)


def _chunks(source: Bytes, begin: int, rank: int) -> _Data | None:
    """All chunks together; each is compressed by itself."""
    tree = source.number(begin + 3, 8)
    if tree == UNDEFINED:
        return None
    key = 8 + 8 * (rank + 1)
    # A key begins with the bytes of its chunk.
    return _Data(tree, sum(source.number(place - key, 4) for place in tree_leaves(source, tree, key)), plain=False)


def _check_apart(spans: set[tuple[int, int]], at: Place) -> None:
    end = 0
    for begin, nbytes in sorted(spans):
        if nbytes and begin < end:
            at.fail("two of its datasets overlap")
        end = max(end, begin + nbytes)


def _content(file: File, data: _Data, item: int) -> memoryview:
    content = file.data[data.begin : data.begin + data.nbytes]
    if item == 1:
        return content
    return np.frombuffer(content, f">u{item}").astype(f"<u{item}").view(np.uint8).data
