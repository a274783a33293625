"""`.npy` and `.npz` files. An array's header is a Python literal; it is matched by a pattern, never evaluated."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from pared.files.checks import Place
from pared.files.disk import File
from pared.files.memory_limit import MemoryLimit
from pared.files.pickles import read_pickle
from pared.files.zip_file import Archive, Member, inflated
from pared.readers.listing import ListedTensor, Listing, Note, Storage
from pared.readers.torch.names import HARMLESS

_MAGIC: Final = b"\x93NUMPY"
_LENGTHS: Final = {1: struct.Struct("<H"), 2: struct.Struct("<I"), 3: struct.Struct("<I")}  # by version
_LARGEST_HEADER: Final = 10_000  # NumPy's own limit
_HELD_NBYTES: Final = 1400
_HEADER: Final = re.compile(
    r"\{ ?'descr': ('[^'\\]{1,20}'|\[.*\]|\(.*\)), ?'fortran_order': (True|False), ?'shape': \(([\d ,]*)\),? ?\}\s*"
)
_DESCR: Final = re.compile(r"'([<>|=]?)([biufcSUVOMm?])(\d{0,5})(?:\[\w+\])?'")
_WORDS: Final = {"i": "int", "u": "uint", "f": "float", "c": "complex"}
_OBJECTS: Final = "Python objects, as a pickle"


@dataclass(frozen=True)
class _Header:
    """The header of an array: its dtype by torch's name if it has one, else by NumPy's; "O" for Python objects."""

    dtype: str
    item: int
    shape: tuple[int, ...]
    fortran: bool
    swapped: bool
    nbytes: int

    @property
    def content(self) -> int:
        """The size of the numbers in bytes."""
        return math.prod(self.shape) * self.item

    def held(self, name: str, storage: str) -> ListedTensor:
        strides = tuple(math.prod(self.shape[:i]) for i in range(len(self.shape)))
        stride = strides if self.fortran and len(self.shape) > 1 and self.content else None
        return ListedTensor(name, self.dtype, self.shape, self.content, storage, 0, stride)


def is_npy(file: File) -> bool:
    """Whether the file begins as a NumPy array."""
    return bytes(file.data[: len(_MAGIC)]) == _MAGIC


def read_npy(file: File) -> Listing:
    """List the array of a `.npy` file, under the name "array".

    Raises:
        CorruptError: its header contradicts itself, or the size of the file.
    """
    at = Place(file.where)
    header = _header(bytes(file.data[: _LARGEST_HEADER + 12]), at)
    notes = {"(header)": Note(header.nbytes)}
    behind = len(file.data) - header.nbytes
    if header.dtype == "O":
        memory = file.memory
        found = read_pickle(file.data[header.nbytes :], HARMLESS, file.where, memory)
        return Listing((), {}, notes | {"(array)": Note(behind, _OBJECTS)}, found.imports)
    if header.content != behind:
        at.fail(f"its numbers take {header.content:,} bytes, and behind its header there are {behind:,}")
    content = partial(_numbers, lambda: file.data[header.nbytes :], header)
    return Listing((header.held("array", "array"),), {"array": Storage(header.content, content)}, notes)


def is_npz(archive: Archive) -> bool:
    """Whether an archive holds only NumPy arrays."""
    return bool(archive.members) and all(member.name.endswith(".npy") for member in archive.members)


def read_npz(file: File, archive: Archive) -> Listing:
    """List the arrays of a `.npz` archive; compressed ones are decompressed when their numbers are read.

    Raises:
        CorruptError: an array contradicts itself, or the archive.
        UnsafeError: listing them would exceed the memory limit.
    """
    memory = file.memory
    tensors: list[ListedTensor] = []
    storages: dict[str, Storage] = {}
    notes: dict[str, Note] = {}
    imports: set[str] = set()
    headers = 0
    for member in archive.members:
        memory.take(_HELD_NBYTES)
        name = member.name.removesuffix(".npy")
        at = Place(f"{file.where}: {name}")
        header = _header(inflated(file, member, most=_LARGEST_HEADER + 12), at)
        if header.dtype == "O":
            notes[f"({name})"] = Note(member.stored, _OBJECTS)
            imports |= _imports(file, member, header.nbytes, memory)
            continue
        if header.nbytes + header.content != member.nbytes:
            at.fail(f"it takes {header.nbytes + header.content:,} bytes, and its member has {member.nbytes:,}")
        tensors.append(header.held(name, name))
        storages[name] = _storage(file, member, header, memory)
        headers += header.nbytes if member.plain else 0
    notes["(headers)"] = Note(headers)
    return Listing(tuple(tensors), storages, notes, tuple(sorted(imports)), kind="a NumPy .npz archive", flat=True)


def _storage(file: File, member: Member, header: _Header, memory: MemoryLimit) -> Storage:
    if member.plain:
        start = member.offset + header.nbytes
        return Storage(header.content, partial(_numbers, lambda: file.data[start : member.end], header))
    # Twice: the pieces are joined after decompression.
    affordable = memory.affords(2 * member.nbytes)
    content = partial(_numbers, lambda: memoryview(inflated(file, member))[header.nbytes :], header)
    return Storage(member.stored, content if affordable else None, coded=True)


def _imports(file: File, member: Member, start: int, memory: MemoryLimit) -> set[str]:
    """What unpickling the objects of an array would import."""
    memory.take(2 * member.nbytes)
    content = memoryview(inflated(file, member))
    return set(read_pickle(content[start:], HARMLESS, file.where, memory).imports)


def _numbers(view: Callable[[], memoryview], header: _Header) -> memoryview:
    """The numbers in little-endian byte order."""
    content = view()
    if not header.swapped:
        return content
    half = header.item // 2 if header.dtype.startswith("complex") else header.item
    return np.frombuffer(content, f">u{half}").astype(f"<u{half}").view(np.uint8).data


def _header(head: bytes, at: Place) -> _Header:
    """Parse the header of an array from its first bytes."""
    version = head[6] if head.startswith(_MAGIC) and len(head) > 12 else 0
    if version not in _LENGTHS:
        at.fail("it is not a NumPy array of a known version")
    start = 8 + _LENGTHS[version].size
    nbytes = start + _LENGTHS[version].unpack_from(head, 8)[0]
    if nbytes > len(head):
        at.fail("its header is truncated, or longer than NumPy writes them")
    found = _HEADER.fullmatch(head[start:nbytes].decode("latin-1"))
    if found is None:
        at.fail("its header is not one that NumPy writes")
    descr, fortran, sizes = found.groups()
    shape = at.shape(
        [int(size) if len(size) < 20 else -1 for size in sizes.replace(" ", "").split(",") if size], "shape"
    )
    dtype, item, order = _dtype(descr, at)
    return _Header(dtype, item, shape, fortran == "True", order == ">" and dtype in _SWAPPED, nbytes)


_SWAPPED: Final = frozenset(f"{word}{8 * size}" for word in _WORDS.values() for size in (2, 4, 8, 16))


def _dtype(descr: str, at: Place) -> tuple[str, int, str]:
    """The dtype's name, the bytes of one element, and their order."""
    found = _DESCR.fullmatch(descr)
    if found is None:
        # A structured dtype: only NumPy could tell its size, and would evaluate the header for it.
        at.fail("its elements have several fields: weights never have")
    order, kind, digits = found.groups()
    size = int(digits or 1)
    if kind == "O":
        return "O", 1, order
    if kind in "b?":
        return "bool", 1, order
    if kind in _WORDS and size in (1, 2, 4, 8, 16):
        return f"{_WORDS[kind]}{8 * size}", size, order
    return descr.strip("'"), 4 * size if kind == "U" else 8 if kind in "mM" else size, order
