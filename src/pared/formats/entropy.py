"""The coder of code streams: Huffman-coded symbols, with an exact cost.

A tensor's codes (int8 or int16, in C order) become one payload; its parameters, a `Coding`, stand in the
artifact's index. Why it is the standard library's zlib that codes: `docs/decisions/002-coder.md`.

What the bytes mean. A payload of n codes of b bits, b being 8 or 16, has as its coding one of

* none: the payload is the n codes as little-endian two's complement numbers (n may be 0);
* `{"constant": v}`: the payload is empty and every code is v (n > 0);
* `{"per_symbol": k}` or `{"per_symbol": k, "low_bits": l}` (n > 0), l being 0 where it is missing: (k, l) is
  (1, 0), (2, 0), (3, 0) or (4, 0), for b = 8 also (2, 4), for b = 16 also (1, 4), (1, 8) or (2, 8).

In the last case the codes are cut into chunks of 65,024 * k, the last chunk taking what is left. The payload is the
length in bytes of every chunk but the last, each a little-endian uint32, then the chunks without gaps. With each code
being `high * 2^l + low` and `0 <= low < 2^l`, a chunk is, without gaps,

1. the `low` of its codes: nothing (l = 0), one byte each (l = 8), or two in a byte (l = 4), with the first
   half of the codes in the lower halves of the bytes and the second half, a missing one being 0, in the
   upper halves;
2. the `high` of its codes as symbols, in one raw deflate stream (RFC 1951) without matches. A symbol is a
   byte of k digits of base R, the first the least significant; R is 256, 16, 6 or 4 for a k of 1, 2, 3 or 4.
   With m = R / 2 - 1, the digit is `high + m` where `-m <= high <= m`, and otherwise R - 1, the escape. The
   digits that the last symbol has to spare are m;
3. the `high` of its escapes in order, each a little-endian two's complement number of b bits. Nothing is
   listed if `high` has b - l bits and R = 2^(b - l): R - 1 then stands for -R / 2 alone.

A symbol costs at least a bit: a chunk of more than eight symbols to a byte is refused before it is inflated.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pared.errors import CorruptError, ParedError
from pared.files.threads import each, usable_cores

# Symbols in a chunk. Deflate slides its window of 64 KiB, at a price, when a stream comes within 262 bytes of
# its end; streams that stay below are encoded a sixth faster. Chunks are also the unit of parallel work.
CHUNK: Final = 65_024
_THREAD: Final = 4  # chunks that make another thread worth starting

# The base of the digits, by how many of them share a byte; the top digit is the escape.
RADIX: Final = {1: 256, 2: 16, 3: 6, 4: 4}

# The legal (per_symbol, low_bits), by the bytes of a code.
_WHOLE: Final = ((1, 0), (2, 0), (3, 0), (4, 0))
_LAYOUTS: Final = {1: (*_WHOLE, (2, 4)), 2: (*_WHOLE, (1, 4), (1, 8), (2, 8))}

# Layouts are compared on _RUNS runs of _RUN neighbouring codes. Among those within a factor of _SMALL of the fewest
# bytes, the one with the fewest symbols wins, because symbols cost time.
_FEW: Final = 1 << 10  # codes that are sorted in less time than a table of all values is filled
_RUNS: Final = 8
_RUN: Final = 8192
_TINY: Final = 6  # bytes: no deflate stream with a table of its own is shorter
_SMALL: Final = 1.002

Codes = NDArray[Any]  # of int8 or int16
_Payload = bytes | memoryview
_Bytes = NDArray[np.uint8]


@final
@dataclass(frozen=True)
class Coding:
    """The parameters of a payload: what the index keeps, and the payload does not.

    Args:
        per_symbol: how many codes share a symbol, 1 to 4.
        low_bits: how many bits of each code are stored as they are: 0, 4 or 8.
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
            coding = cls(data.get("per_symbol", 1), data.get("low_bits", 0), data.get("constant"))
            layout = coding.per_symbol, coding.low_bits
            if layout in _LAYOUTS[1] + _LAYOUTS[2] and coding.to_json() == data:
                return coding
        raise CorruptError(f"{str(data)[:80]} is not a coding")

    @property
    def limit(self) -> int:
        """The largest magnitude that has a digit of its own."""
        return RADIX[self.per_symbol] // 2 - 1

    @property
    def escape(self) -> int:
        """The digit that stands for all values without a digit of their own."""
        return RADIX[self.per_symbol] - 1

    @property
    def span(self) -> int:
        """The number of codes in a full chunk."""
        return CHUNK * self.per_symbol


@final
@dataclass(frozen=True)
class Stream:
    """Codes as bytes, and how to read them; `coding` is None where the bytes are the codes themselves."""

    payload: bytes
    coding: Coding | None = None


def encode(codes: Codes, threads: int | None = None, coding: Coding | None = None) -> Stream:
    """Code a tensor's codes; the same codes give the same bytes, whatever the number of threads.

    Args:
        codes: int8 or int16, of any shape.
        threads: the largest number of threads; default: one for each processor that this process may use.
        coding: the layout to try; default: the best.

    Returns:
        A stream whose payload is never longer than `codes.nbytes`.

    >>> encode(np.array([0, 1, 0, -1] * 50, np.int8)).coding
    Coding(per_symbol=4, low_bits=0, constant=None)
    """
    flat = _flat(codes)
    if flat.size and (flat == flat[0]).all():
        return Stream(b"", Coding(constant=int(flat[0])))
    tiny = flat.nbytes <= _TINY and all(_least(flat, Coding(*one)) >= flat.nbytes for one in _LAYOUTS[flat.itemsize])
    if flat.size and not tiny:
        coding = coding or _choose(flat)
        payload = _encode(flat, coding, threads)
        if len(payload) < flat.nbytes:
            return Stream(payload, coding)
    return Stream(flat.astype(flat.dtype.newbyteorder("<"), copy=False).tobytes())


def cost(codes: Codes, threads: int | None = None) -> int:
    """Exactly how many bytes the payload of `encode(codes)` has.

    >>> cost(np.zeros((64, 64), np.int8)), cost(np.array([1, -2], np.int8))
    (0, 2)
    """
    return len(encode(codes, threads).payload)


def entropy(codes: Codes) -> float:
    """The order-0 entropy in bits per code, the least that a coder of single codes can reach (Shannon 1948).

    >>> entropy(np.array([0, 0, 1, -1], np.int8))
    1.5
    """
    flat = _flat(codes)
    unsigned = flat.view(f"u{flat.itemsize}")
    if flat.size < _FEW:
        counts = np.unique(unsigned, return_counts=True)[1]
    else:
        counts = np.zeros(1 << 8 * flat.itemsize, np.int64)
        for start in range(0, flat.size, 1 << 20):  # bincount widens what it is given to eight bytes
            counts += np.bincount(unsigned[start : start + (1 << 20)], minlength=len(counts))
    shares = counts[counts > 0] / max(flat.size, 1)
    return abs(float((shares * np.log2(shares)).sum()))


def decode(payload: _Payload, coding: Coding | None, count: int, dtype: DTypeLike, threads: int | None = None) -> Codes:
    """Decode a payload into a new array of one dimension.

    Memory is bounded by `count`, which the caller has to check: an empty payload may stand for any number of
    equal codes.

    Args:
        payload: the bytes that `encode` returned.
        coding: its parameters, or None.
        count: the number of codes.
        dtype: their type, int8 or int16.
        threads: the largest number of threads; default: one for each processor that this process may use.

    Raises:
        CorruptError: the payload does not hold exactly that number of codes of that type.

    >>> stream = encode(np.array([[5, -5], [0, 5]], np.int8))
    >>> decode(stream.payload, stream.coding, 4, np.int8).tolist()
    [5, -5, 0, 5]
    """
    kind = _native(np.dtype(dtype))
    data = memoryview(payload)
    if coding is None:
        if len(data) != count * kind.itemsize:
            raise CorruptError(f"{count} plain {kind} codes take {count * kind.itemsize} bytes, not {len(data)}")
        return np.frombuffer(data, kind.newbyteorder("<")).astype(kind)
    value = coding.constant
    if value is not None:
        if data or not count or not np.iinfo(kind).min <= value <= np.iinfo(kind).max:
            raise CorruptError(f"{len(data)} bytes cannot stand for {count} {kind} codes that are all {value}")
        return np.full(count, value, kind)
    if not count or (coding.per_symbol, coding.low_bits) not in _LAYOUTS[kind.itemsize]:
        raise CorruptError(f"{count} {kind} codes cannot have the coding {coding.to_json()}")
    starts = range(0, count, coding.span)
    chunks = _cut(data, [min(coding.span, count - start) for start in starts], coding)
    out = np.empty(count, kind)
    calls = [(out[i : i + coding.span], chunk, coding) for i, chunk in zip(starts, chunks, strict=True)]
    each(lambda call: _decode_chunk(*call), calls, most=_threads(len(calls), threads))
    return out


def _least(flat: Codes, coding: Coding) -> int:
    """The fewest bytes of a few codes: a deflate stream takes two beside one for each symbol."""
    codes: list[int] = flat.tolist()
    escapes = sum(abs(code >> coding.low_bits) > coding.limit for code in codes) * flat.itemsize
    return escapes + _quotient(flat.size * coding.low_bits, 8) + _quotient(flat.size, coding.per_symbol) + 2


def _choose(flat: Codes) -> Coding:
    """The layout that codes a sample in the fewest bytes, or nearly so in fewer symbols."""
    sample = flat
    if flat.size > _RUNS * _RUN:
        starts = np.linspace(0, flat.size - _RUN, _RUNS).astype(int)
        sample = np.concatenate([flat[start : start + _RUN] for start in starts])
    bits, layouts = entropy(sample), _LAYOUTS[flat.itemsize]
    # A symbol can tell eight bits, and where it would tell less than three, the low bits have not earned a split.
    codings = [Coding(k, low) for k, low in layouts if (3 if low else 0) <= k * (bits - low) < 8.01]
    if len(codings) == 1:
        return codings[0]
    sizes = {coding: len(_encode(sample, coding, threads=1)) for coding in codings}
    good = [coding for coding in codings if sizes[coding] <= _SMALL * min(sizes.values())]
    return max(good, key=lambda coding: (coding.per_symbol, -sizes[coding]))


def _encode(flat: Codes, coding: Coding, threads: int | None) -> bytes:
    parts = [flat[start : start + coding.span] for start in range(0, flat.size, coding.span)]
    chunks = each(lambda part: _encode_chunk(part, coding), parts, most=_threads(len(parts), threads))
    lengths = np.array([sum(map(len, chunk)) for chunk in chunks[:-1]], "<u4")
    return b"".join([lengths.tobytes(), *chain.from_iterable(chunks)])


def _encode_chunk(codes: Codes, coding: Coding) -> tuple[bytes, ...]:
    """Encode a chunk, as pieces to be joined."""
    high = codes >> coding.low_bits if coding.low_bits else codes
    digits = high.view(f"u{high.itemsize}") + np.uint8(coding.limit)  # wraps: what has no digit is above them all
    escapes = high[:0]
    if _has_escapes(coding, codes.dtype):
        escaped = digits >= coding.escape
        escapes = high[escaped]
        digits[escaped] = coding.escape
    else:
        digits &= coding.escape
    symbols = _pack(digits.astype(np.uint8, copy=False), coding)
    deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    listed = escapes.astype(escapes.dtype.newbyteorder("<")).tobytes()
    return _low_bytes(codes, coding.low_bits), deflate.compress(symbols.data), deflate.flush(), listed


def _decode_chunk(place: Codes, chunk: memoryview, coding: Coding) -> None:
    low_size = _quotient(place.size * coding.low_bits, 8)
    symbols, listed = _inflate(chunk[low_size:], _quotient(place.size, coding.per_symbol))
    digits = _unpack(symbols, coding)
    if (digits[place.size :] != coding.limit).any():
        raise CorruptError("the spare digits of a chunk are not those of zeros")
    digits = digits[: place.size]
    place[:] = (digits - np.uint8(coding.limit)).view(np.int8)
    escaped = digits == coding.escape if _has_escapes(coding, place.dtype) else np.zeros(0, bool)
    count = int(np.count_nonzero(escaped))
    if len(listed) != count * place.itemsize:
        raise CorruptError(f"a chunk with {count} escapes lists {len(listed)} bytes of them")
    if listed:
        place[escaped] = _escapes(listed, coding, place.dtype)
    if coding.low_bits:
        place *= 1 << coding.low_bits
        place |= _low_values(chunk[:low_size], place.size, coding.low_bits).astype(place.dtype)


def _cut(data: memoryview, sizes: list[int], coding: Coding) -> list[memoryview]:
    """The chunks of a payload, none of them too short for the number of its codes."""
    start = 4 * (len(sizes) - 1)
    if len(data) < start:
        raise CorruptError(f"{len(data)} bytes cannot hold {len(sizes)} chunks")
    lengths = np.frombuffer(data[:start], "<u4").tolist()
    lengths.append(len(data) - start - sum(lengths))
    chunks = []
    for size, length in zip(sizes, lengths, strict=True):
        symbols = _quotient(size, coding.per_symbol)
        if length < _quotient(size * coding.low_bits, 8) + _quotient(symbols, 8):
            raise CorruptError(f"{length} bytes cannot hold a chunk of {symbols} symbols")
        chunks.append(data[start : start + length])
        start += length
    return chunks


def _inflate(data: memoryview, symbols: int) -> tuple[_Bytes, bytes]:
    """The symbols of a deflate stream, and the bytes after it."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = stream.decompress(data, symbols + 1)
    except zlib.error as error:
        raise CorruptError(f"a chunk does not inflate: {error}") from error
    if len(inflated) != symbols or not stream.eof:
        raise CorruptError(f"a chunk does not inflate to exactly {symbols} symbols")
    return np.frombuffer(inflated, np.uint8), stream.unused_data


def _pack(digits: _Bytes, coding: Coding) -> _Bytes:
    """Symbols of `per_symbol` digits each."""
    each = coding.per_symbol
    if len(digits) % each:
        digits = np.append(digits, np.full(-len(digits) % each, coding.limit, np.uint8))
    symbols = digits[each - 1 :: each]
    for position in reversed(range(each - 1)):
        symbols = symbols * np.uint8(RADIX[each]) + digits[position::each]
    return symbols


def _unpack(symbols: _Bytes, coding: Coding) -> _Bytes:
    """The inverse of `_pack`, spare digits included."""
    each = coding.per_symbol
    if each == 1:
        return symbols
    if symbols.max() >= RADIX[each] ** each:
        raise CorruptError(f"a chunk holds symbols beyond {RADIX[each] ** each - 1}")
    digits = np.empty(len(symbols) * each, np.uint8)
    for position in range(each):
        quotient = symbols // np.uint8(RADIX[each])
        digits[position::each] = symbols - quotient * np.uint8(RADIX[each])
        symbols = quotient
    return digits


def _escapes(data: bytes, coding: Coding, kind: np.dtype[Any]) -> Codes:
    """The high parts of escaped codes."""
    escapes = np.frombuffer(data, kind.newbyteorder("<")).astype(kind)
    wide = escapes.astype(np.int32)
    largest = np.iinfo(kind).max >> coding.low_bits
    if (abs(wide) <= coding.limit).any() or (wide > largest).any() or (wide < ~largest).any():
        raise CorruptError("a value is listed as an escape that has a digit, or that is too large for a code")
    return escapes


def _has_escapes(coding: Coding, kind: np.dtype[Any]) -> bool:
    """Whether the high part of a code may need an escape: it has more values than there are digits."""
    return 1 << 8 * kind.itemsize - coding.low_bits > coding.escape + 1


def _low_bytes(codes: Codes, bits: int) -> bytes:
    """The lowest bits of all codes: none, a byte each, or for four bits two halves of the codes side by side."""
    if not bits:
        return b""
    low = (codes & ((1 << bits) - 1)).astype(np.uint8)
    if bits == 4:
        low = np.append(low, np.zeros(len(low) % 2, np.uint8)).reshape(2, -1)
        low = low[0] | low[1] << np.uint8(4)
    return low.tobytes()


def _low_values(data: memoryview, count: int, bits: int) -> _Bytes:
    """The inverse of `_low_bytes`."""
    low = np.frombuffer(data, np.uint8)
    if bits == 4:
        low = np.concatenate([low & np.uint8(15), low >> np.uint8(4)])
        if low[count:].any():
            raise CorruptError("the spare low bits of a chunk are not zero")
    return low[:count]


def _threads(chunks: int, most: int | None) -> int:
    return max(1, min(most or usable_cores(), chunks // _THREAD))


def _flat(codes: Codes) -> Codes:
    return np.ascontiguousarray(codes, _native(codes.dtype)).reshape(-1)


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.kind != "i" or dtype.itemsize not in _LAYOUTS:
        raise ParedError(f"codes are int8 or int16, not {dtype}", remedy="Convert them first.")
    return dtype.newbyteorder("=")


def _quotient(amount: int, unit: int) -> int:
    """How many units hold the amount."""
    return -(-amount // unit)
