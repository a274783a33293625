"""GGUF, the format of llama.cpp: metadata, a table of tensors, and their blocks of codes."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from pared.files.checks import Place
from pared.files.disk import File
from pared.readers.listing import ListedTensor, Listing, Note, Split, Storage, stray, unknown

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_ALIGNMENT_KEY: Final = b"general.alignment"
_DEFAULT_ALIGNMENT: Final = 32
# What a file says that is one of several.
_NUMBER_KEY: Final = b"split.no"
_COUNT_KEY: Final = b"split.count"
_TENSORS_KEY: Final = b"split.tensors.count"
_SPLIT_KEYS: Final = (_NUMBER_KEY, _COUNT_KEY, _TENSORS_KEY)
_MOST_DIMENSIONS: Final = 8  # GGML itself has four
_HELD_NBYTES: Final = 1500
_DEEPEST: Final = 4

_COUNT: Final = struct.Struct("<Q")
_NUMBER: Final = struct.Struct("<I")
# The values of metadata by the number of their type: bytes of those of fixed size, then texts and arrays.
_FIXED: Final[Mapping[int, int]] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32: Final = 4
_TEXT: Final = 8
_ARRAY: Final = 9


@dataclass(frozen=True)
class Block:
    """How GGML stores one type.

    Args:
        name: torch's name if torch has the type, else GGML's.
        elements: the number of elements in a block.
        nbytes: the size of a block.
    """

    name: str
    elements: int
    nbytes: int


# By the type's number: ggml/include/ggml.h of llama.cpp.
BLOCKS: Final[Mapping[int, Block]] = {
    0: Block("float32", 1, 4), 1: Block("float16", 1, 2), 2: Block("Q4_0", 32, 18), 3: Block("Q4_1", 32, 20),
    6: Block("Q5_0", 32, 22), 7: Block("Q5_1", 32, 24), 8: Block("Q8_0", 32, 34), 9: Block("Q8_1", 32, 40),
    10: Block("Q2_K", 256, 84), 11: Block("Q3_K", 256, 110), 12: Block("Q4_K", 256, 144),
    13: Block("Q5_K", 256, 176), 14: Block("Q6_K", 256, 210), 15: Block("Q8_K", 256, 292),
    16: Block("IQ2_XXS", 256, 66), 17: Block("IQ2_XS", 256, 74), 18: Block("IQ3_XXS", 256, 98),
    19: Block("IQ1_S", 256, 50), 20: Block("IQ4_NL", 32, 18), 21: Block("IQ3_S", 256, 110),
    22: Block("IQ2_S", 256, 82), 23: Block("IQ4_XS", 256, 136), 24: Block("int8", 1, 1), 25: Block("int16", 1, 2),
    26: Block("int32", 1, 4), 27: Block("int64", 1, 8), 28: Block("float64", 1, 8), 29: Block("IQ1_M", 256, 56),
    30: Block("bfloat16", 1, 2), 34: Block("TQ1_0", 256, 54), 35: Block("TQ2_0", 256, 66),
    39: Block("MXFP4", 32, 17), 40: Block("NVFP4", 64, 36), 41: Block("Q1_0", 128, 18),
}  # fmt: skip


def is_gguf(file: File) -> bool:
    """Whether the file begins as GGUF."""
    return bytes(file.data[: len(_MAGIC)]) == _MAGIC


def read_gguf(file: File) -> Listing:
    """List the tensors of a GGUF file, with shapes in torch's order: the last dimension is contiguous.

    Raises:
        FileError: it is of an unsupported version, or big-endian.
        CorruptError: it contradicts itself.
        UnsafeError: listing it would exceed the memory limit.
    """
    reader = _Reader(file.data, len(_MAGIC), Place(file.where))
    version = reader.number()
    if version not in _VERSIONS:
        order = "one in big-endian byte order" if version % 0x10000 == 0 else f"of version {version}"
        raise unknown(file, f"a GGUF file, {order}")
    tensors, entries = reader.count(), reader.count()
    alignment = _DEFAULT_ALIGNMENT
    said: dict[bytes, int] = {}
    for _ in range(entries):
        key, kind = bytes(reader.text()), reader.number()
        if key == _ALIGNMENT_KEY and kind == _UINT32:
            alignment = reader.number()
        elif key in _SPLIT_KEYS and kind in _FIXED:
            begin = reader.skip(_FIXED[kind])
            said[key] = int.from_bytes(reader.data[begin : reader.position], "little")
        else:
            reader.skip_value(kind, 0)
    if not 0 < alignment <= 1 << 20:
        reader.at.fail("its alignment is out of range")
    metadata = reader.position
    memory = file.memory
    found = []
    for _ in range(tensors):
        memory.take(_HELD_NBYTES)
        found.append(_tensor(reader))
    start = -(-reader.position // alignment) * alignment
    gaps = _gaps([(start + offset, held) for offset, held in found], start, alignment, file.data, reader.at)
    count = said.get(_COUNT_KEY)
    return Listing(
        tensors=tuple(held for _, held in found),
        storages={
            held.name: Storage(held.nbytes, partial(_content, file, start + offset, held.nbytes))
            for offset, held in found
        },
        notes={"(metadata)": Note(metadata), "(header)": Note(reader.position - metadata), **gaps},
        split=None if count is None else Split(said.get(_NUMBER_KEY, 0), count, said.get(_TENSORS_KEY)),
    )


class _Reader:
    """Reads consecutive values, and never beyond the end of the file."""

    def __init__(self, data: memoryview, position: int, at: Place) -> None:
        self.data = data
        self.position = position
        self.at = at

    def skip(self, nbytes: int) -> int:
        """Advance by `nbytes`, and return the previous position."""
        begin = self.position
        if nbytes > len(self.data) - begin:
            self.at.fail("its header reaches beyond its end: it is truncated")
        self.position += nbytes
        return begin

    def number(self) -> int:
        """An unsigned integer of four bytes."""
        value: int = _NUMBER.unpack_from(self.data, self.skip(_NUMBER.size))[0]
        return value

    def count(self) -> int:
        """An unsigned integer of eight bytes."""
        value: int = _COUNT.unpack_from(self.data, self.skip(_COUNT.size))[0]
        return value

    def text(self) -> memoryview:
        """The bytes of a string."""
        length = self.count()
        begin = self.skip(length)
        return self.data[begin : begin + length]

    def skip_value(self, kind: int, depth: int) -> None:
        if kind in _FIXED:
            self.skip(_FIXED[kind])
        elif kind == _TEXT:
            self.text()
        elif kind == _ARRAY and depth < _DEEPEST:
            inner, length = self.number(), self.count()
            if inner in _FIXED:
                self.skip(length * _FIXED[inner])
                return
            for _ in range(length):
                self.skip_value(inner, depth + 1)
        else:
            self.at.fail("its metadata has a value of an unknown type")


def _tensor(reader: _Reader) -> tuple[int, ListedTensor]:
    """A tensor, and its offset from the end of the header."""
    try:
        name = bytes(reader.text()).decode("utf-8")
    except UnicodeDecodeError:
        reader.at.fail("the name of a tensor is not valid text")
    at = Place(f"{reader.at.place}: {name}")
    rank = reader.number()
    if rank > _MOST_DIMENSIONS:
        at.fail(f"it has {rank} dimensions")
    shape = at.shape([reader.count() for _ in range(rank)][::-1], "shape")
    kind, offset = reader.number(), reader.count()
    if kind not in BLOCKS:
        at.fail(f"its element type {kind} is unknown")
    block = BLOCKS[kind]
    if (shape[-1] if shape else 1) % block.elements:
        at.fail(f"its rows are not a multiple of its blocks of {block.elements} elements")
    return offset, ListedTensor(name, block.name, shape, math.prod(shape) // block.elements * block.nbytes, name)


def _gaps(
    placed: list[tuple[int, ListedTensor]], start: int, alignment: int, data: memoryview, at: Place
) -> dict[str, Note]:
    """Check that tensors have distinct names, do not overlap and are within the file; return what else is there."""
    nbytes = len(data)
    if len({held.name for _, held in placed}) != len(placed):
        at.fail("two of its tensors have the same name")
    end, between = start, 0
    for begin, held in sorted(placed, key=lambda item: item[0]):
        if begin < end:
            at.fail(f"tensor {held.name!r} begins within another")
        if begin - end >= alignment:
            between += sum(note.nbytes for note in stray(data, end, min(begin, nbytes), "").values())
        end = begin + held.nbytes
    if end > nbytes:
        at.fail(f"its tensors end at byte {end:,}, and the file has {nbytes:,}: it is truncated")
    gaps = {"(bytes between its tensors)": Note(between, "between its tensors, and belong to none", stray=True)}
    return (gaps if between else {}) | stray(data, end, nbytes, "after its last tensor")


def _content(file: File, begin: int, nbytes: int) -> memoryview:
    return file.data[begin : begin + nbytes]
