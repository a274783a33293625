"""Laws of the code-stream coder, a slow reference of its decoder, and what it does with hostile bytes."""

import itertools
import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.errors import CorruptError, ParedError
from pared.formats import entropy
from pared.formats.entropy import CHUNK, RADIX, Codes, Coding, Stream, cost, decode, encode


def draw(distribution: str, step: float, size: int, dtype: str) -> Codes:
    """Codes of values with unit variance on a grid of that step."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=size) if distribution == "gauss" else rng.laplace(size=size) / 2**0.5
    limit = int(np.iinfo(dtype).max)
    return np.round(values / step).clip(-limit, limit).astype(dtype)


def draw_at(bits: float, distribution: str, size: int, dtype: str) -> Codes:
    """Codes whose entropy is `bits`."""
    low, high = 1e-4, 10.0
    for _ in range(16):
        step = (low * high) ** 0.5
        finer = entropy.entropy(draw(distribution, step, 50_000, "int16")) > bits
        low, high = (step, high) if finer else (low, step)
    return draw(distribution, step, size, dtype)


def wild(codes: Codes, share: float = 0.001) -> Codes:
    """The same codes, a few of them replaced by any value of their type."""
    rng = np.random.default_rng(1)
    limits = np.iinfo(codes.dtype)
    anything = rng.integers(limits.min, limits.max + 1, codes.size).astype(codes.dtype)
    mixed: Codes = np.where(rng.random(codes.size) < share, anything, codes)
    return mixed


def reference(stream: Stream, count: int, dtype: str) -> list[int]:
    """The docstring of the module, as read by somebody who is in no hurry."""
    size, data, coding = np.dtype(dtype).itemsize, stream.payload, stream.coding
    if coding is None:
        return numbers(data, size)
    if coding.constant is not None:
        return [coding.constant] * count
    span = CHUNK * coding.per_symbol
    start = 4 * ((count - 1) // span)
    lengths = [int.from_bytes(data[i : i + 4], "little") for i in range(0, start, 4)]
    lengths.append(len(data) - start - sum(lengths))
    codes: list[int] = []
    for length in lengths:
        codes += reference_chunk(data[start : start + length], min(span, count - len(codes)), coding, size)
        start += length
    return codes


def reference_chunk(chunk: bytes, count: int, coding: Coding, size: int) -> list[int]:
    k, bits, radix = coding.per_symbol, coding.low_bits, RADIX[coding.per_symbol]
    most = radix // 2 - 1
    low = chunk[: (count * bits + 7) // 8]
    inflater = zlib.decompressobj(-15)
    symbols = inflater.decompress(chunk[len(low) :])
    escapes = iter(numbers(inflater.unused_data, size))
    lows = {0: [0] * count, 8: list(low), 4: [byte & 15 for byte in low] + [byte >> 4 for byte in low]}[bits]
    codes = []
    for index in range(count):
        digit = symbols[index // k] // radix ** (index % k) % radix
        high = digit - most
        if digit == radix - 1:
            high = -radix // 2 if radix == 2 ** (8 * size - bits) else next(escapes)
        codes.append(high * 2**bits + lows[index])
    assert next(escapes, None) is None
    return codes


def numbers(data: bytes, size: int) -> list[int]:
    return [int.from_bytes(data[i : i + size], "little", signed=True) for i in range(0, len(data), size)]


@st.composite
def any_codes(draw_from: st.DrawFn) -> Codes:
    """Peaked, flat, constant, empty; with and without far outliers; contiguous or not."""
    dtype = draw_from(st.sampled_from(["int8", "int16"]))
    limits = np.iinfo(dtype)
    most = draw_from(st.sampled_from([0, 1, 2, 7, 20, 127, 1000, 40000]))
    near = st.integers(max(-most, limits.min), min(most, limits.max))
    values = draw_from(st.lists(near, max_size=300)) * draw_from(st.sampled_from([1, 1, 9]))
    far = st.tuples(st.integers(0, max(len(values) - 1, 0)), st.integers(limits.min, limits.max))
    for index, value in draw_from(st.lists(far, max_size=3)) if values else []:
        values[index] = value
    codes: Codes = np.array(values, dtype)
    return codes[::2] if draw_from(st.booleans()) else codes


# One tensor for each way of coding, of several chunks, the last one odd; with any value of the type here and there.
LAYOUTS = {
    "int8, one": (Coding(1), wild(draw("gauss", 0.1, 2 * CHUNK + 1, "int8"))),
    "int8, two": (Coding(2), wild(draw("gauss", 0.7, 4 * CHUNK + 1, "int8"))),
    "int8, three": (Coding(3), wild(draw("gauss", 1.8, 3 * CHUNK + 2, "int8"))),
    "int8, four": (Coding(4), wild(draw("gauss", 2.9, 5 * CHUNK + 3, "int8"), 1e-4)),
    "int8, two and four bits": (Coding(2, 4), wild(draw("gauss", 0.03, 3 * CHUNK, "int8")[:-1])),
    "int16, one": (Coding(1), wild(draw("gauss", 0.1, 2 * CHUNK + 5, "int16"))),
    "int16, two": (Coding(2), wild(draw("gauss", 0.7, 4 * CHUNK + 1, "int16"))),
    "int16, three": (Coding(3), wild(draw("gauss", 1.8, 3 * CHUNK + 2, "int16"))),
    "int16, four": (Coding(4), wild(draw("gauss", 2.9, 5 * CHUNK + 3, "int16"), 1e-4)),
    "int16, one and four bits": (Coding(1, 4), wild(draw("gauss", 0.003, 2 * CHUNK + 7, "int16"))),
    "int16, one and eight bits": (Coding(1, 8), wild(draw("gauss", 0.0003, 2 * CHUNK + 7, "int16"), 0.01)),
    "int16, two and eight bits": (Coding(2, 8), wild(draw("gauss", 0.002, 3 * CHUNK + 1, "int16"))),
    "int8, constant": (Coding(constant=-128), np.full(CHUNK + 1, -128, "int8")),
    "int16, constant": (Coding(constant=32767), np.full(7, 32767, "int16")),
    "int8, plain": (None, np.random.default_rng(0).integers(-128, 128, 5000).astype("int8")),
    "int16, plain": (None, np.random.default_rng(0).integers(-32768, 32768, 5000).astype("int16")),
    "int8, empty": (None, np.empty(0, "int8")),
}


@pytest.mark.parametrize("name", LAYOUTS)
class TestEveryLayout:
    def test_it_is_chosen_where_it_is_best(self, name: str) -> None:
        coding, codes = LAYOUTS[name]
        stream = encode(codes)
        assert stream.coding == coding
        assert len(stream.payload) == cost(codes) <= codes.nbytes

    def test_codes_come_back(self, name: str) -> None:
        _, codes = LAYOUTS[name]
        stream = encode(codes)
        decoded = decode(memoryview(stream.payload), stream.coding, codes.size, codes.dtype)
        assert decoded.dtype == codes.dtype
        assert decoded.flags.writeable
        assert np.array_equal(decoded, codes)

    def test_the_reference_reads_it(self, name: str) -> None:
        _, codes = LAYOUTS[name]
        assert reference(encode(codes), codes.size, str(codes.dtype)) == codes.tolist()

    def test_the_coding_survives_json(self, name: str) -> None:
        coding, _ = LAYOUTS[name]
        assert coding is None or Coding.from_json(coding.to_json()) == coding

    def test_truncation_is_an_error(self, name: str) -> None:
        _, codes = LAYOUTS[name]
        stream = encode(codes)
        size = len(stream.payload)
        for length in sorted({0, 1, size // 2, size - 1} if size else ()):
            with pytest.raises(CorruptError):
                decode(stream.payload[:length], stream.coding, codes.size, codes.dtype)

    def test_bytes_behind_it_are_an_error(self, name: str) -> None:
        _, codes = LAYOUTS[name]
        stream = encode(codes)
        with pytest.raises(CorruptError):
            decode(stream.payload + b"\0", stream.coding, codes.size, codes.dtype)

    def test_another_count_is_an_error(self, name: str) -> None:
        coding, codes = LAYOUTS[name]
        stream = encode(codes)
        constant = coding is not None and coding.constant is not None  # which is right for any count but none
        for count in {0} if constant else {codes.size + 5, 100 * codes.size + 1, max(codes.size - 5, 1)}:
            with pytest.raises(CorruptError):
                decode(stream.payload, coding, count, codes.dtype)


@settings(deadline=None, max_examples=200)
@given(any_codes())
@pytest.mark.slow
def test_any_codes_come_back_and_never_take_more_than_raw(codes: Codes) -> None:
    stream = encode(codes)
    assert len(stream.payload) <= codes.nbytes
    assert cost(codes) == len(stream.payload)
    assert np.array_equal(decode(stream.payload, stream.coding, codes.size, codes.dtype), codes)
    assert reference(stream, codes.size, str(codes.dtype)) == codes.tolist()
    assert stream.coding is None or Coding.from_json(stream.coding.to_json()) == stream.coding


RATES = [("int16", bits) for bits in (12, 11, 10, 9, 8, 7, 5, 3, 2, 1.5, 1)] + [
    ("int8", bits) for bits in (7, 6, 5, 4, 3.5, 3, 2.5, 2, 1.75, 1.5, 1.25, 1)
]


@pytest.mark.parametrize("distribution", ["gauss", "laplace"])
@pytest.mark.parametrize(("dtype", "bits"), RATES)
def test_the_rate_is_within_0_15_bit_of_entropy(bits: float, dtype: str, distribution: str) -> None:
    codes = draw_at(bits, distribution, 300_000, dtype)
    assert entropy.entropy(codes) == pytest.approx(bits, abs=0.2)
    assert 0 < 8 * cost(codes) / codes.size - entropy.entropy(codes) < 0.15


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_entropy_is_that_of_the_histogram(dtype: str) -> None:
    codes = draw("laplace", 0.5, 30_000, dtype)
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    assert entropy.entropy(codes) == pytest.approx(-(shares * np.log2(shares)).sum())
    assert entropy.entropy(codes[:0]) == 0
    assert str(entropy.entropy(codes[:1])) == "0.0"


@pytest.mark.parametrize("step", [0.05, 1.5])
def test_threads_do_not_change_the_bytes(step: float) -> None:
    codes = wild(draw("gauss", step, 40 * CHUNK + 3, "int8"))
    streams = [encode(codes, threads) for threads in (1, 2, 5, None)]
    assert streams.count(streams[0]) == 4
    for threads in (1, 3, None):
        decoded = decode(streams[0].payload, streams[0].coding, codes.size, "int8", threads)
        assert np.array_equal(decoded, codes)


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    codes = draw("gauss", 0.1, 20 * CHUNK, "int8")
    stream = encode(codes)
    broken = bytearray(stream.payload)
    broken[len(broken) // 2 :] = bytes(len(broken) - len(broken) // 2)
    with pytest.raises(CorruptError, match="a chunk"):
        decode(bytes(broken), stream.coding, codes.size, "int8", 2)


def test_a_callers_own_threads_do_not_wait_for_each_other() -> None:
    codes = draw("gauss", 0.1, 10 * CHUNK, "int8")
    with ThreadPoolExecutor(4) as pool:
        streams = list(pool.map(encode, [codes] * 8, [2] * 8))
    assert streams.count(streams[0]) == 8


FORK = """
import multiprocessing
import numpy as np
from pared.formats import entropy

codes = np.random.default_rng(0).integers(-20, 20, 20 * entropy.CHUNK).astype("int8")
stream = entropy.encode(codes, 4)

def child():
    decoded = entropy.decode(stream.payload, stream.coding, codes.size, "int8", 4)
    raise SystemExit(0 if (decoded == codes).all() and entropy.encode(codes, 4) == stream else 1)

process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(60)
raise SystemExit(2 if process.exitcode is None else process.exitcode)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.child
def test_a_forked_child_can_code() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FORK], env=environment, timeout=120, check=False)
    assert done.returncode == 0


def test_big_endian_and_strided_codes_are_the_same_codes() -> None:
    codes = draw("gauss", 0.01, 5000, "int16")
    assert encode(codes.astype(">i2")) == encode(codes)
    assert encode(codes.reshape(50, 100).T.copy().T) == encode(codes)
    assert decode(codes[:3].astype("<i2").tobytes(), None, 3, ">i2").tolist() == codes[:3].tolist()


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int32", "bool"])
def test_other_types_are_refused(dtype: str) -> None:
    for attempt in (lambda: encode(np.zeros(3, dtype)), lambda: decode(b"", Coding(), 3, dtype)):
        with pytest.raises(ParedError) as caught:
            attempt()
        assert caught.value.what == f"codes are int8 or int16, not {dtype}"
        assert caught.value.remedy == "Convert them first."


@pytest.mark.parametrize(
    "data",
    [
        None, 5, [], "per_symbol", {}, {1: 1}, {"constant": None}, {"constant": 1.0}, {"constant": True},
        {"per_symbol": 0}, {"per_symbol": 5}, {"per_symbol": "1"}, {"per_symbol": 1, "other": 0},
        {"per_symbol": 1, "low_bits": 0}, {"per_symbol": 1, "low_bits": 3}, {"per_symbol": 3, "low_bits": 4},
        {"low_bits": 4}, {"per_symbol": 1, "constant": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_coding_is_read_strictly(data: object) -> None:
    with pytest.raises(CorruptError) as caught:
        Coding.from_json(data)
    assert caught.value.what == f"{data} is not a coding"
    assert caught.value.remedy == "Fetch the file again; it is damaged."


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


@pytest.mark.parametrize("kind", [np.int8, np.int16])
def test_a_few_codes_are_coded_exactly_where_that_is_shorter(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told without coding them is what coding them gives."""
    values = [-128, -8, -3, -2, -1, 0, 1, 2, 7, 127] if kind is np.int8 else [-300, -129, -2, 0, 1, 2, 200]
    rows = [row for size in range(1, 5) for row in itertools.product(values, repeat=size)][::7]
    rows += [tuple(np.random.default_rng(i).choice(values[2:8], 6)) for i in range(300)]
    arrays = [np.array(row, kind) for row in rows]
    told = [entropy.encode(array) for array in arrays]
    monkeypatch.setattr(entropy, "_TINY", 0)
    assert told == [entropy.encode(array) for array in arrays]
