from __future__ import annotations

import numpy as np
import pytest

from pared.targets.folders.bits import packed, words


def unpacked(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Bit by bit, and slowly."""
    found = np.zeros((*stream.shape[:-1], count), np.int64)
    for place in np.ndindex(stream.shape[:-1]):
        whole = sum(int(word) % (1 << 32) << (32 * i) for i, word in enumerate(stream[place]))
        found[place] = [whole >> (i * bits) & ((1 << bits) - 1) for i in range(count)]
    return found


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 32, 33, 96, 100])
def test_codes_come_back(bits: int, count: int) -> None:
    random = np.random.default_rng(bits)
    codes = random.integers(-(1 << bits - 1), 1 << bits - 1, (3, 2, count)).astype(np.int8)
    stream = packed(codes, bits)
    assert stream.dtype == np.int32
    assert stream.shape == (3, 2, words(count, bits))
    assert np.array_equal(unpacked(stream, bits, count), codes.astype(int) + (1 << bits - 1))


@pytest.mark.parametrize("bits", [4, 8])
def test_transposed_codes_are_taken_as_they_are(bits: int) -> None:
    codes = np.arange(-8, 8, dtype=np.int8).reshape(2, 8).T
    assert np.array_equal(packed(codes, bits), packed(codes.copy(), bits))
