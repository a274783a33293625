"""The wire format of protocol buffers, parsed in place: nothing is copied, and everything is checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pared.files.checks import Place

_LONGEST_VARINT: Final = 10
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # wire types; groups, which are obsolete, are refused

Value = int | memoryview  # a number; or the bytes of a string, a message, packed numbers or a fixed-size number


def fields(data: memoryview, at: Place) -> Iterator[tuple[int, Value]]:
    """The fields of a message, as (field number, value), in the order of the file.

    Raises:
        CorruptError: the data is not a message.

    >>> [(number, value) for number, value in fields(memoryview(bytes([8, 150, 1])), Place("file"))]
    [(1, 150)]
    """
    position = 0
    while position < len(data):
        key, position = varint(data, position, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, position = varint(data, position, at)
            yield number, value
            continue
        if kind == _BYTES:
            length, position = varint(data, position, at)
        elif kind in (_EIGHT, _FOUR):
            length = 8 if kind == _EIGHT else 4
        else:
            at.fail("it is not a protocol buffer, or a damaged one")
        if length > len(data) - position:
            at.fail("one of its fields extends beyond the message that contains it")
        yield number, data[position : position + length]
        position += length


def varint(data: memoryview, position: int, at: Place) -> tuple[int, int]:
    """The variable-length integer at a position, and the position after it."""
    value = shift = 0
    while position < len(data) and shift < 7 * _LONGEST_VARINT:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value & ((1 << 64) - 1), position
        shift += 7
    return at.fail("a variable-length integer in it is too long or truncated")


def numbers(value: Value, at: Place) -> Iterator[int]:
    """The signed integers in a field: a single one, or several packed."""
    if isinstance(value, int):
        yield _signed(value)
        return
    position = 0
    while position < len(value):
        unsigned, position = varint(value, position, at)
        yield _signed(unsigned)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_PIECE: Final = 1 << 16


def unpack_varints(chunks: Sequence[Value], dtype: str, count: int, at: Place) -> NDArray[np.generic]:
    """Integers from fields that hold them, single or packed, as an array; decoded in pieces to bound the memory.

    Args:
        chunks: the fields' values.
        dtype: NumPy type of the result; higher bits are cut off.
        count: the expected number of integers.
        at: the place in the file, for error messages.
    """
    result = np.zeros(count, dtype)
    filled = 0
    for piece in _pieces(chunks, at):
        # Surplus numbers are counted, but not kept.
        room = result[filled : filled + len(piece)]
        room[:] = piece[: len(room)].astype(dtype)
        filled += len(piece)
    if filled != count:
        at.fail(f"it holds {filled:,} numbers where its shape needs {count:,}")
    return result


def _pieces(chunks: Sequence[Value], at: Place) -> Iterator[NDArray[np.uint64]]:
    for chunk in chunks:
        if isinstance(chunk, int):
            yield np.array([chunk], np.uint64)
            continue
        begin = 0
        while begin < len(chunk):
            data = np.frombuffer(chunk[begin : begin + _PIECE], np.uint8)
            ends = np.flatnonzero(data < 0x80)
            if not len(ends):
                at.fail("a variable-length integer in it is too long or truncated")
            begin += int(ends[-1]) + 1
            yield _decoded(data[: ends[-1] + 1], ends, at)


def _decoded(data: NDArray[np.uint8], ends: NDArray[np.intp], at: Place) -> NDArray[np.uint64]:
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST_VARINT:
        at.fail("a variable-length integer in it is too long or truncated")
    shifts = (np.arange(len(data)) - np.repeat(starts, lengths)).astype(np.uint64) * np.uint64(7)
    return np.add.reduceat((data & 0x7F).astype(np.uint64) << shifts, starts)
