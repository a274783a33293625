"""What the decoder of code streams does with hostile bytes."""

import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.errors import CorruptError
from pared.formats.entropy import CHUNK, RADIX, Coding, decode, encode
from tests.formats.layouts import LAYOUTS


def deflated(symbols: bytes, strategy: int = zlib.Z_HUFFMAN_ONLY) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return deflate.compress(symbols) + deflate.flush()


# The symbol of codes that are all zero, by how many share it.
ZERO = {k: bytes([sum((radix // 2 - 1) * radix**i for i in range(k))]) for k, radix in RADIX.items()}
ONE, TWO, THREE, FOUR = Coding(1), Coding(2), Coding(3), Coding(4)
SQUEEZED = deflated(ZERO[1] * 4000, zlib.Z_DEFAULT_STRATEGY)

HOSTILE: dict[str, tuple[bytes, Coding | None, int, str, str]] = {
    "plain, short": (b"\0" * 5, None, 3, "int16", "3 plain int16 codes take 6 bytes, not 5"),
    "constant with bytes": (
        b"\0", Coding(constant=3), 2, "int8", "1 bytes cannot stand for 2 int8 codes that are all 3"),
    "constant of nothing": (
        b"", Coding(constant=3), 0, "int8", "0 bytes cannot stand for 0 int8 codes that are all 3"),
    "constant out of range": (
        b"", Coding(constant=128), 2, "int8", "0 bytes cannot stand for 2 int8 codes that are all 128"),
    "coding of nothing": (b"", ONE, 0, "int8", "0 int8 codes cannot have the coding {'per_symbol': 1}"),
    "coding of the other type": (
        b"", Coding(1, 4), 9, "int8", "9 int8 codes cannot have the coding {'per_symbol': 1, 'low_bits': 4}"),
    "no room for the table": (b"\0" * 7, ONE, 2 * CHUNK + 1, "int8", "7 bytes cannot hold 3 chunks"),
    "chunks beyond the end": (
        b"\xff\xff\0\0" + bytes(9000), ONE, CHUNK + 9, "int8",
        "-56535 bytes cannot hold a chunk of 9 symbols"),
    "expansion": (
        SQUEEZED, ONE, 4000, "int8", f"{len(SQUEEZED)} bytes cannot hold a chunk of 4000 symbols"),
    "no deflate": (
        b"\xff" * 20, ONE, 20, "int8",
        "a chunk does not inflate: Error -3 while decompressing data: invalid block type"),
    "too many symbols": (
        deflated(ZERO[1] * 101), ONE, 100, "int8", "a chunk does not inflate to exactly 100 symbols"),
    "too few symbols": (
        deflated(ZERO[1] * 99), ONE, 100, "int8", "a chunk does not inflate to exactly 100 symbols"),
    "bomb": (
        deflated(ZERO[1] * 10**6, zlib.Z_DEFAULT_STRATEGY), ONE, 100, "int8",
        "a chunk does not inflate to exactly 100 symbols"),
    "cut": (
        deflated(bytes(range(100)))[:-1], ONE, 100, "int8",
        "a chunk does not inflate to exactly 100 symbols"),
    "impossible symbol": (deflated(b"\xd8" * 33), THREE, 99, "int8", "a chunk holds symbols beyond 215"),
    "spare digits": (
        deflated(ZERO[2] * 49 + b"\x87"), TWO, 99, "int8",
        "the spare digits of a chunk are not those of zeros"),
    "bytes behind": (
        deflated(ZERO[1] * 100) + b"ab", ONE, 100, "int8", "a chunk with 0 escapes lists 2 bytes of them"),
    "escape not listed": (
        deflated(ZERO[2] * 49 + b"\xf7"), TWO, 100, "int8", "a chunk with 1 escapes lists 0 bytes of them"),
    "needless escape": (
        deflated(ZERO[2] * 49 + b"\xf7") + b"\x07", TWO, 100, "int8",
        "a value is listed as an escape that has a digit, or that is too large for a code"),
    "escape too large": (
        bytes(50) + deflated(ZERO[1] * 99 + b"\xff") + b"\x00\x08", Coding(1, 4), 100, "int16",
        "a value is listed as an escape that has a digit, or that is too large for a code"),
    "escape too small": (
        bytes(50) + deflated(ZERO[1] * 99 + b"\xff") + b"\xff\xf7", Coding(1, 4), 100, "int16",
        "a value is listed as an escape that has a digit, or that is too large for a code"),
    "spare low bits": (
        bytes(49) + b"\x10" + deflated(ZERO[1] * 99), Coding(1, 4), 99, "int16",
        "the spare low bits of a chunk are not zero"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_payloads_have_each_their_error(name: str) -> None:
    payload, coding, count, dtype, message = HOSTILE[name]
    with pytest.raises(CorruptError) as caught:
        decode(payload, coding, count, dtype)
    assert caught.value.what == message
    assert caught.value.remedy == "Fetch the file again; it is damaged."


def test_the_hostile_payloads_are_near_misses() -> None:
    for k, coding in enumerate([ONE, TWO, THREE, FOUR], start=1):
        assert not decode(deflated(ZERO[k] * 30), coding, 30 * k - k // 2, "int8").any()
    assert decode(deflated(ZERO[2] * 49 + b"\xf7") + b"\x08", TWO, 100, "int8")[-1] == 8
    escaped = bytes(50) + deflated(ZERO[1] * 99 + b"\xff") + b"\x00\xf8"
    assert decode(escaped, Coding(1, 4), 100, "int16")[-1] == -32768
    assert decode(bytes(50) + deflated(ZERO[2] * 49 + b"\xf7"), Coding(2, 4), 100, "int8")[-1] == -128
    assert not decode(bytes(50) + deflated(ZERO[1] * 99), Coding(1, 4), 99, "int16").any()


def test_an_impossible_expansion_is_refused_before_it_is_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    def inflate(*_: Any) -> None:
        raise AssertionError("inflated")

    monkeypatch.setattr(zlib, "decompressobj", inflate)
    with pytest.raises(CorruptError, match="cannot hold a chunk of 4000 symbols"):
        decode(SQUEEZED, ONE, 4000, "int8")


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(LAYOUTS)), st.data())
@pytest.mark.slow
def test_mutations_give_an_error_or_as_many_codes(name: str, data: st.DataObject) -> None:
    _, codes = LAYOUTS[name]
    stream = encode(codes)
    payload = bytearray(stream.payload)
    last = len(payload) - 1
    for _ in range(data.draw(st.integers(1, 3)) if payload else 0):
        place = data.draw(st.integers(0, last) | st.integers(0, min(last, 12)))
        payload[place] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(bytes(payload), stream.coding, codes.size, codes.dtype)
    except CorruptError:
        return
    assert decoded.shape == codes.shape
    assert decoded.dtype == codes.dtype
