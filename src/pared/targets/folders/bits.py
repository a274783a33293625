"""Codes of 2 to 8 bits in words of 32 bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pared.formats.groups.grid import Numbers

_WORD = 32
_RUN = 8  # codes, which end on a byte whatever their bits are


def words(count: int, bits: int) -> int:
    """The words that hold `count` codes."""
    return -(-count * bits // _WORD)


def packed(codes: Numbers, bits: int) -> NDArray[np.int32]:
    """Codes along the last dimension as one stream of bits, lowest first, in words; each row begins with a word.

    Args:
        codes: int8 (..., n), from -2^(bits-1) to 2^(bits-1)-1, which are stored from 0 on.
        bits: the bits of a code.

    Returns:
        int32 (..., words).

    >>> packed(np.array([[-8, -7, 7]], np.int8), 4).tolist() == [[0xF10]]
    True
    """
    count = codes.shape[-1]
    runs = -(-count // _WORD) * (_WORD // _RUN)
    raised = np.zeros((*codes.shape[:-1], runs * _RUN), np.uint8)
    np.add(np.ascontiguousarray(codes).view(np.uint8), np.uint8(1 << (bits - 1)), out=raised[..., :count])
    raised = raised.reshape(*codes.shape[:-1], runs, _RUN)
    stream = np.zeros((*codes.shape[:-1], runs, bits), np.uint8)
    for i in range(_RUN):
        byte, shift = divmod(i * bits, 8)
        stream[..., byte] |= raised[..., i] << np.uint8(shift)
        if shift + bits > 8:
            stream[..., byte + 1] |= raised[..., i] >> np.uint8(8 - shift)
    whole = stream.reshape(*codes.shape[:-1], runs * bits).view("<i4")
    return whole[..., : words(count, bits)]
