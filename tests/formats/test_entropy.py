"""Laws of the code-stream coder, and a slow reference of its decoder."""

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
from tests.formats.layouts import LAYOUTS, draw, wild


def draw_at(bits: float, distribution: str, size: int, dtype: str) -> Codes:
    """Codes whose entropy is `bits`."""
    low, high = 1e-4, 10.0
    for _ in range(16):
        step = (low * high) ** 0.5
        finer = entropy.entropy(draw(distribution, step, 50_000, "int16")) > bits
        low, high = (step, high) if finer else (low, step)
    return draw(distribution, step, size, dtype)


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
