"""Read the header of a .safetensors file, strictly; write such a file. Both without torch."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from pared.errors import CorruptError
from pared.files.checks import Place
from pared.files.disk import File

_ALIGNMENT: Final = 64  # of the data in the file, in bytes, so that they can be mapped
_LENGTH: Final = struct.Struct("<Q")
_NBYTES_PER_BYTE: Final = 32  # the most memory that Python's objects take for a byte of JSON
_SPAN_NBYTES: Final = 300  # beside its name and its shape
_SIZE_NBYTES: Final = 8
_METADATA: Final = "__metadata__"
_SPACE: Final = b" \t\n\r"
# An entry without anything unusual: parsed one after the other, these take the memory of one at a time.
_ENTRY: Final = re.compile(rb'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*(\{[^{}]*\})[ \t\n\r]*([,}])')
_LARGEST_HEADER: Final = 100_000_000  # as in the safetensors library

# The bits of one element, by the type's name in the file.
_BITS: Final[Mapping[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Span:
    """One tensor of a .safetensors file.

    Args:
        name: as it stands in the header.
        dtype: the header's name for the element type, "F32" for instance.
        shape: the tensor's.
        begin: the offset in the file of its first byte.
        end: the offset after its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a .safetensors file.

    Args:
        metadata: free text by key.
        spans: the tensors in the order of their bytes.
        nbytes: the size of the header, with its length field.
    """

    metadata: Mapping[str, str]
    spans: tuple[Span, ...]
    nbytes: int


def is_safetensors(file: File) -> bool:
    """Whether the file begins as a .safetensors file."""
    return bytes(file.data[8:9]) == b"{" and _LENGTH.unpack_from(file.data)[0] <= _LARGEST_HEADER


def read_header(file: File) -> Header:
    """Read the header of a .safetensors file, and check that its tensors fill the rest of the file without gaps.

    Raises:
        CorruptError: it contradicts itself or the size of the file.
        UnsafeError: its header is too long for a file of this size.
    """
    at = Place(file.where)
    nbytes = _LENGTH.size + _LENGTH.unpack_from(file.data)[0]
    if nbytes > len(file.data):
        at.fail(f"its header has {nbytes:,} bytes, and the file {len(file.data):,}: it is truncated")
    metadata, found = _one_by_one(file, nbytes, at) or _at_once(file, nbytes, at)
    for key, value in metadata.items():
        at.text(value, f"its metadata {key!r}")
    spans = sorted(found, key=lambda s: (s.begin, s.end))
    end = nbytes
    for span in spans:
        if span.begin != end:
            at.fail(f"tensor {span.name!r} begins at byte {span.begin:,} of the file, not at byte {end:,}")
        end = span.end
    if end != len(file.data):
        what = "it is truncated" if end > len(file.data) else "the rest does not belong to any tensor"
        at.fail(f"its tensors end at byte {end:,}, and the file has {len(file.data):,}: {what}")
    return Header(metadata, tuple(spans), nbytes)


def _at_once(file: File, nbytes: int, at: Place) -> tuple[dict[str, Any], list[Span]]:
    """The metadata and the tensors of any header, and what is wrong with it."""
    file.memory.take(_NBYTES_PER_BYTE * nbytes)
    top = at.mapping(at.json(bytes(file.data[_LENGTH.size : nbytes]), "its header"), "its header")
    metadata = at.mapping(top.pop(_METADATA, {}), "its metadata")
    return metadata, [_span(name, value, nbytes, at) for name, value in top.items()]


def _one_by_one(file: File, nbytes: int, at: Place) -> tuple[dict[str, Any], list[Span]] | None:
    """The same of a header of plain entries, in memory for what they say; None if it is not one."""
    left = file.memory.left
    metadata: dict[str, Any] | None = None
    spans: dict[str, Span] = {}
    position, after = _LENGTH.size + 1, b","
    while after == b",":
        entry = _ENTRY.match(file.data, position, nbytes)
        name = _decoded(entry[1]) if entry is not None else None
        if entry is None or name is None or name in spans or (name == _METADATA and metadata is not None):
            break
        position, after = entry.end(), entry[3]
        parsing = _NBYTES_PER_BYTE * len(entry[2])
        file.memory.take(parsing)
        try:
            value = at.json(entry[2], "its header")
        except CorruptError:
            break
        if name == _METADATA:
            metadata = at.mapping(value, "its metadata")
            continue
        spans[name] = span = _span(name, value, nbytes, at)
        file.memory.give(parsing)
        file.memory.take(_SPAN_NBYTES + _SIZE_NBYTES * len(span.shape) + sys.getsizeof(name))
    if after == b"}" and not bytes(file.data[position:nbytes]).strip(_SPACE):
        return metadata or {}, list(spans.values())
    file.memory.left = left
    return None


def _decoded(name: bytes) -> str | None:
    try:
        return name.decode("utf-8")
    except ValueError:
        return None


def _span(name: str, value: object, start: int, at: Place) -> Span:
    at = Place(f"{at.place}: {at.text(name, 'the name of a tensor')}")
    known = at.fields(value, "its entry", ("dtype", "shape", "data_offsets"))
    dtype = sys.intern(at.one_of(known["dtype"], _BITS, "its dtype"))
    shape = at.shape(known["shape"], "shape")
    offsets = [at.whole(offset, "an offset") for offset in at.sequence(known["data_offsets"], "its data_offsets")]
    bits = math.prod(shape) * _BITS[dtype]
    if len(offsets) != 2 or bits % 8 or offsets[1] - offsets[0] != bits // 8:
        at.fail(f"its offsets {offsets} do not fit shape {list(shape)} of {dtype}")
    return Span(name, dtype, shape, start + offsets[0], start + offsets[1])


def write_safetensors(stream: BinaryIO, index: bytes, data: Iterable[bytes | memoryview], nbytes: int) -> None:
    """Write the two records of an artifact as a .safetensors file, the data first and on a 64-byte boundary.

    Args:
        stream: where the file begins.
        index: the first record.
        data: the second record, in pieces.
        nbytes: the size of the second record in bytes.

    >>> import io
    >>> stream = io.BytesIO()
    >>> write_safetensors(stream, b"12", [b"34", b"5"], 3)
    >>> len(stream.getvalue()) % 64, stream.getvalue()[-5:]
    (5, b'34512')
    """
    stream.write(_header_of_records(len(index), nbytes))
    for piece in data:
        stream.write(piece)
    stream.write(index)


def nbytes_of_records(index: int, nbytes: int) -> int:
    """The size of a file that `write_safetensors` writes, from those of the two records.

    >>> nbytes_of_records(2, 3) - nbytes_of_records(0, 0)
    5
    """
    return len(_header_of_records(index, nbytes)) + index + nbytes


def _header_of_records(index: int, nbytes: int) -> bytes:
    spans = {"data": (0, nbytes), "index": (nbytes, nbytes + index)}
    tensors = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in spans.items()
    }
    return encoded_header({"format": "pared"}, tensors, _ALIGNMENT)


def encoded_header(metadata: Mapping[str, str], tensors: Mapping[str, Any], alignment: int) -> bytes:
    """The bytes of a header, its length included, padded with spaces to a multiple of `alignment` bytes.

    Args:
        metadata: free text by key; "format" says which library's the tensors are.
        tensors: the entry of each tensor, by name.
        alignment: the data that follow begin at a multiple of it, in bytes.
    """
    header = json.dumps({"__metadata__": dict(metadata), **tensors}, separators=(",", ":")).encode("ascii")
    header += b" " * (-(_LENGTH.size + len(header)) % alignment)
    return _LENGTH.pack(len(header)) + header
