"""The coder of code streams: Huffman-coded symbols, with an exact cost.

A tensor's codes (int8 or int16, in C order) become one payload; its parameters, a `Coding`, stand in the artifact's
index. All of it is done by numpy and by the standard library's zlib, whose Huffman-only mode comes within 0.15 bit
of the order-0 entropy once codes share symbols where a symbol of one code would cost more than it tells.
`docs/decisions/002-coder.md` says why.

What the bytes mean. A payload of n codes of b bits, b being 8 or 16, has as its coding one of

* none: the payload is the n codes as little-endian two's complement numbers (n may be 0);
* `{"constant": v}`: the payload is empty and every code is v (n > 0);
* `{"per_symbol": k}` or `{"per_symbol": k, "low_bits": l}` (n > 0) with k from 1 to 4, and with l, which is 0 where
  it is missing, 4 or 8 where k is 1 and b is 16.

In the last case the codes are cut into chunks of 65,024 * k, the last chunk taking what is left. The payload is the
length in bytes of every chunk but the last, each a little-endian uint32, then the chunks without gaps. Each code is
`high * 2^l + low` with `0 <= low < 2^l`, and a chunk is, without gaps,

1. the `low` of its codes: nothing (l = 0), one byte each (l = 8), or two in a byte (l = 4), the first in the lower
   half, a missing second being 0;
2. the `high` of its codes as symbols, in one raw deflate stream (RFC 1951) that uses no matches. A symbol is a byte
   that holds k digits of base R, the first the least significant, R being 256, 16, 6 or 4 for a k of 1, 2, 3 or 4.
   With m = R / 2 - 1, the digit is `high + m` where `-m <= high <= m`, and otherwise R - 1, the escape. Digits that
   the last symbol has to spare are m;
3. the `high` of its escapes in order, each a little-endian two's complement number of b bits.

A symbol costs at least a bit, so a chunk with more than eight symbols to a byte is refused before it is inflated.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pared.errors import CorruptError, ParedError

# Symbols in a chunk. Deflate slides its window of 64 KiB, at a price, when a stream comes within 262 bytes of the
# window's end; streams that stay below encode a sixth faster. Chunks are also the unit of parallel work.
CHUNK: Final = 65_024

# The base of the digits, by how many of them share a byte; the top digit is the escape.
RADIX: Final = {1: 256, 2: 16, 3: 6, 4: 4}

# The legal (per_symbol, low_bits), by the bytes of a code.
_UNSPLIT: Final = ((1, 0), (2, 0), (3, 0), (4, 0))
_LAYOUTS: Final = {1: _UNSPLIT, 2: (*_UNSPLIT, (1, 4), (1, 8))}

# Sharing symbols never pays above so many bits of entropy: Huffman's loss is small there.
_SHARED_BELOW: Final = 3.0

# Layouts are compared on so many runs of so many neighbouring codes.
_RUNS: Final = 8
_RUN: Final = 8192

Codes = NDArray[np.int8] | NDArray[np.int16]
_Result = TypeVar("_Result")


@final
@dataclass(frozen=True)
class Coding:
    """The parameters of a payload: what the index keeps, and the payload does not.

    Args:
        per_symbol: how many codes share a symbol, 1 to 4.
        low_bits: how many bits of each code are stored as they are: 0, or for int16 codes 4 or 8.
        constant: the value of all codes; the payload is then empty and the rest has no meaning.

    >>> Coding(per_symbol=2).to_json(), Coding(low_bits=4).to_json()
    ({'per_symbol': 2}, {'per_symbol': 1, 'low_bits': 4})
    >>> Coding.from_json({"constant": -3}).constant
    -3
    """

    per_symbol: int = 1
    low_bits: int = 0
    constant: int | None = None

    def to_json(self) -> dict[str, int]:
        """The coding as it stands in an artifact's index; never empty."""
        if self.constant is not None:
            return {"constant": self.constant}
        return {"per_symbol": self.per_symbol} | ({"low_bits": self.low_bits} if self.low_bits else {})

    @classmethod
    def from_json(cls, data: object) -> Coding:
        """The coding that an index holds.

        Raises:
            CorruptError: it is not what `to_json` gives for a coding.
        """
        if isinstance(data, dict) and all(type(value) is int for value in data.values()):
            known = {key: data[key] for key in ("per_symbol", "low_bits", "constant") if key in data}
            coding = cls(**known)
            legal = coding.constant is not None or (coding.per_symbol, coding.low_bits) in _LAYOUTS[2]
            if legal and coding.to_json() == data:
                return coding
        raise _corrupt(f"{str(data)[:80]} is not a coding")

    @property
    def limit(self) -> int:
        """The largest magnitude that has a digit of its own."""
        return RADIX[self.per_symbol] // 2 - 1

    @property
    def span(self) -> int:
        """How many codes a full chunk holds."""
        return CHUNK * self.per_symbol


@final
@dataclass(frozen=True)
class Stream:
    """Codes as bytes, and how to read them; `coding` is None where the bytes are the codes themselves."""

    payload: bytes
    coding: Coding | None = None


def encode(codes: Codes, threads: int | None = None) -> Stream:
    """Code a tensor's codes; the same codes give the same bytes, whatever the number of threads.

    Args:
        codes: int8 or int16, of any shape.
        threads: at most so many at work; default: one for each processor that this process may use.

    Returns:
        A stream whose payload is never longer than `codes.nbytes`.

    >>> encode(np.array([7, 7, 7], np.int8)).coding
    Coding(per_symbol=1, low_bits=0, constant=7)
    >>> encode(np.array([0, 1, 0, -1] * 50, np.int8)).coding
    Coding(per_symbol=4, low_bits=0, constant=None)
    """
    flat = _flat(codes)
    if flat.size and bool((flat == flat[0]).all()):
        return Stream(b"", Coding(constant=int(flat[0])))
    if flat.size:
        coding = _choose(flat)
        payload = _encode(flat, coding, threads)
        if len(payload) < flat.nbytes:
            return Stream(payload, coding)
    return Stream(flat.astype(_little(flat.dtype), copy=False).tobytes())


def cost(codes: Codes, threads: int | None = None) -> int:
    """Exactly how many bytes the payload of `encode(codes)` has.

    >>> cost(np.zeros((64, 64), np.int8)), cost(np.arange(-127, 128, dtype=np.int8))
    (0, 255)
    """
    return len(encode(codes, threads).payload)


def entropy(codes: Codes) -> float:
    """The order-0 entropy in bits per code, which no coder beats that takes codes one by one (Shannon 1948).

    >>> entropy(np.array([0, 0, 1, -1], np.int8))
    1.5
    """
    flat = _flat(codes)
    bins = 1 << 8 * flat.itemsize
    counts = np.zeros(bins, np.int64)
    for start in range(0, flat.size, 1 << 20):  # bincount widens what it is given to eight bytes
        counts += np.bincount(_unsigned(flat[start : start + (1 << 20)]), minlength=bins)
    shares = counts[counts > 0] / max(flat.size, 1)
    return abs(float((shares * np.log2(shares)).sum()))


def decode(
    payload: bytes | memoryview,
    coding: Coding | None,
    count: int,
    dtype: DTypeLike,
    threads: int | None = None,
) -> Codes:
    """The codes of a payload, as a new array of one dimension.

    Memory is bounded by `count`, which the caller must have checked: an empty payload may stand for any number of
    equal codes.

    Args:
        payload: what `encode` gave.
        coding: its parameters, or None.
        count: how many codes there are.
        dtype: their type, int8 or int16.
        threads: at most so many at work; default: one for each processor that this process may use.

    Raises:
        CorruptError: the payload does not hold exactly so many codes of that type.

    >>> stream = encode(np.array([[5, -5], [0, 5]], np.int8))
    >>> decode(stream.payload, stream.coding, 4, np.int8).tolist()
    [5, -5, 0, 5]
    """
    kind = _native(np.dtype(dtype))
    data = memoryview(payload)
    if coding is None:
        if len(data) != count * kind.itemsize:
            raise _corrupt(f"{count} plain {kind} codes take {count * kind.itemsize} bytes, not {len(data)}")
        return np.frombuffer(data, _little(kind)).astype(kind)
    value = coding.constant
    if value is not None:
        if data or not count or not np.iinfo(kind).min <= value <= np.iinfo(kind).max:
            raise _corrupt(f"{len(data)} bytes cannot stand for {count} {kind} codes that are all {value}")
        return np.full(count, value, kind)
    if not count or (coding.per_symbol, coding.low_bits) not in _LAYOUTS[kind.itemsize]:
        raise _corrupt(f"{count} {kind} codes cannot have the coding {coding.to_json()}")
    starts = range(0, count, coding.span)
    chunks = _cut(data, [min(coding.span, count - start) for start in starts], coding)
    out = np.empty(count, kind)

    def place(start: int, chunk: memoryview) -> None:
        _decode_chunk(chunk, coding, out[start : start + coding.span])

    _each(place, list(zip(starts, chunks, strict=True)), threads)
    return out


def _choose(flat: Codes) -> Coding:
    """The layout that codes a sample in the fewest bytes."""
    sample = flat
    if flat.size > _RUNS * _RUN:
        starts = np.linspace(0, flat.size - _RUN, _RUNS).astype(int)
        sample = np.concatenate([flat[start : start + _RUN] for start in starts])
    shared = entropy(sample) < _SHARED_BELOW
    codings = [Coding(*layout) for layout in _LAYOUTS[flat.itemsize] if shared or layout[0] == 1]
    if len(codings) == 1:
        return codings[0]
    return min(codings, key=lambda coding: len(_encode(sample, coding, threads=1)))


def _encode(flat: Codes, coding: Coding, threads: int | None) -> bytes:
    parts = [flat[start : start + coding.span] for start in range(0, flat.size, coding.span)]
    chunks = _each(_encode_chunk, [(part, coding) for part in parts], threads)
    lengths = np.array([len(chunk) for chunk in chunks[:-1]], "<u4")
    return b"".join([lengths.tobytes(), *chunks])


def _encode_chunk(codes: Codes, coding: Coding) -> bytes:
    high = codes >> coding.low_bits if coding.low_bits else codes
    shifted = _unsigned(high)
    shifted = shifted + shifted.dtype.type(
        coding.limit
    )  # wraps: what is out of range is then above the digits
    escape = RADIX[coding.per_symbol] - 1
    digits = np.minimum(shifted, shifted.dtype.type(escape)).astype(np.uint8, copy=False)
    escapes = high[shifted >= escape]
    deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    stream = deflate.compress(_pack(digits, coding)) + deflate.flush()
    return _low_bytes(codes, coding.low_bits) + stream + escapes.astype(_little(escapes.dtype)).tobytes()


def _decode_chunk(chunk: memoryview, coding: Coding, place: Codes) -> None:
    """Decode one chunk into its place."""
    low_size = _quotient(place.size * coding.low_bits, 8)
    symbols, listed = _inflate(chunk[low_size:], _quotient(place.size, coding.per_symbol))
    digits = _unpack(symbols, coding)
    if bool((digits[place.size :] != coding.limit).any()):
        raise _corrupt("the spare digits of a chunk are not those of zeros")
    digits = digits[: place.size]
    place[:] = (digits - np.uint8(coding.limit)).view(np.int8)
    escaped = digits == RADIX[coding.per_symbol] - 1
    count = int(np.count_nonzero(escaped))
    if len(listed) != count * place.itemsize:
        raise _corrupt(f"a chunk with {count} escapes lists {len(listed)} bytes of them")
    if count:
        place[escaped] = _escapes(listed, coding, place.dtype)
    if coding.low_bits:
        place <<= coding.low_bits
        place |= _low_values(chunk[:low_size], place.size, coding.low_bits)


def _cut(data: memoryview, sizes: list[int], coding: Coding) -> list[memoryview]:
    """The chunks of a payload, none of them too short for the number of its codes."""
    start = 4 * (len(sizes) - 1)
    if len(data) < start:
        raise _corrupt(f"{len(data)} bytes cannot hold {len(sizes)} chunks")
    lengths = np.frombuffer(data[:start], "<u4").tolist()
    lengths.append(len(data) - start - sum(lengths))
    chunks = []
    for size, length in zip(sizes, lengths, strict=True):
        symbols = _quotient(size, coding.per_symbol)
        if length < _quotient(size * coding.low_bits, 8) + _quotient(symbols, 8):
            raise _corrupt(f"{length} bytes cannot hold a chunk of {symbols} symbols")
        chunks.append(data[start : start + length])
        start += length
    return chunks


def _inflate(data: memoryview, symbols: int) -> tuple[NDArray[np.uint8], bytes]:
    """The symbols of a deflate stream, and the bytes behind it."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = stream.decompress(data, symbols + 1)
    except zlib.error as error:
        raise _corrupt(f"a chunk does not inflate: {error}") from error
    if len(inflated) != symbols or not stream.eof:
        raise _corrupt(f"a chunk does not inflate to exactly {symbols} symbols")
    return np.frombuffer(inflated, np.uint8), stream.unused_data


def _pack(digits: NDArray[np.uint8], coding: Coding) -> NDArray[np.uint8]:
    """Symbols of `per_symbol` digits each."""
    each, radix = coding.per_symbol, RADIX[coding.per_symbol]
    if each == 1:
        return digits
    spare = -len(digits) % each
    digits = np.append(digits, np.full(spare, coding.limit, np.uint8)) if spare else digits
    symbols = digits[each - 1 :: each]
    for position in reversed(range(each - 1)):
        symbols = symbols * np.uint8(radix) + digits[position::each]
    return symbols


def _unpack(symbols: NDArray[np.uint8], coding: Coding) -> NDArray[np.uint8]:
    """The inverse of `_pack`, spare digits included."""
    each, radix = coding.per_symbol, RADIX[coding.per_symbol]
    if each == 1:
        return symbols
    if int(symbols.max()) >= radix**each:
        raise _corrupt(f"a chunk holds symbols beyond {radix**each - 1}")
    digits = np.empty(len(symbols) * each, np.uint8)
    for position in range(each):
        quotient = symbols // np.uint8(radix)
        digits[position::each] = symbols - quotient * np.uint8(radix)
        symbols = quotient
    return digits


def _escapes(data: bytes, coding: Coding, kind: np.dtype[Any]) -> Codes:
    """The high parts of escaped codes."""
    escapes = np.frombuffer(data, _little(kind)).astype(kind)
    bound = 1 << (8 * kind.itemsize - 1 - coding.low_bits)
    wide = escapes.astype(np.int32)
    if bool((abs(wide) <= coding.limit).any() or (wide < -bound).any() or (wide >= bound).any()):
        raise _corrupt("an escape is listed that needs none, or that no code can have")
    return escapes


def _low_bytes(codes: Codes, bits: int) -> bytes:
    """The lowest bits of all codes, two codes to a byte where they are four."""
    low = (codes & ((1 << bits) - 1)).astype(np.uint8)
    if bits == 4:
        low = np.append(low, np.zeros(len(low) % 2, np.uint8))
        low = low[::2] | low[1::2] << 4
    return low.tobytes() if bits else b""


def _low_values(data: memoryview, count: int, bits: int) -> NDArray[np.uint8]:
    """The inverse of `_low_bytes`."""
    low = np.frombuffer(data, np.uint8)
    if bits == 4:
        low = np.stack([low & 15, low >> 4], axis=1).reshape(-1)
        if bool(low[count:].any()):
            raise _corrupt("the spare low bits of a chunk are not zero")
    return low[:count]


def _each(
    task: Callable[..., _Result], calls: Sequence[tuple[Any, ...]], threads: int | None
) -> list[_Result]:
    """The results of all calls, in order; the threads live for this call only, so a fork finds none to wait for."""
    threads = min(len(calls), threads or _processors())
    if threads <= 1:
        return [task(*call) for call in calls]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(task, *zip(*calls, strict=True)))


def _processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _flat(codes: Codes) -> Codes:
    return np.ascontiguousarray(codes, _native(codes.dtype)).reshape(-1)


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.kind != "i" or dtype.itemsize not in _LAYOUTS:
        raise ParedError(
            f"codes are int8 or int16, not {dtype}", remedy="Convert them before they are coded."
        )
    return dtype.newbyteorder("=")


def _little(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("<")


def _unsigned(codes: Codes) -> NDArray[np.uint8] | NDArray[np.uint16]:
    return codes.view(np.uint8) if codes.itemsize == 1 else codes.view(np.uint16)


def _quotient(amount: int, unit: int) -> int:
    """How many units hold the amount."""
    return -(-amount // unit)


def _corrupt(what: str) -> CorruptError:
    return CorruptError(what, remedy="Fetch the file again; it is damaged.")
