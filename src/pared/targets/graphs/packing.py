"""Codes of fewer than 8 bits side by side in bytes, the first code in the lowest bits, as graphs hold them."""

from __future__ import annotations

import numpy as np

from pared.formats.groups.grid import Numbers


def packed(codes: Numbers, bits: int) -> Numbers:
    """Unsigned codes in bytes, along the last dimension; the last byte of a row is filled with zeros.

    Args:
        codes: from 0 to `2^bits - 1`, of any integer type.
        bits: 2, 4 or 8.

    >>> packed(np.array([[1, 2, 3]]), 4).tolist()
    [[33, 3]]
    """
    each = 8 // bits
    short = -codes.shape[-1] % each
    filled = np.pad(codes.astype(np.uint8), [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    made = filled[..., ::each].copy()
    for place in range(1, each):
        made |= filled[..., place::each] << (bits * place)
    return made


def unpacked(numbers: Numbers, bits: int, count: int) -> Numbers:
    """The inverse of `packed`: uint8, of `count` codes along the last dimension.

    >>> unpacked(np.array([[33, 3]], np.uint8), 4, 3).tolist()
    [[1, 2, 3]]
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (numbers[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*numbers.shape[:-1], -1)[..., :count]
