"""Steps for a rate: the step at which the coded stream of a tensor takes a given number of bits per weight.

All rows have the same step, which has the least squared error at a given rate (Gersho 1979). Steps are powers of two in
eighths of an octave, which take few bits in a file; two neighbouring ones are mixed, row by row, to meet a rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from pared.formats.dtypes import Array
from pared.formats.entropy import entropy
from pared.formats.grids import CodeType, encode
from pared.formats.streams import STEP_INDEXES, Steps, ceiling, encode_codes, scale
from pared.formats.views import View

# A rate is measured on a sample of this many weights, and counts as met within this tolerance in bits.
_SAMPLE: Final = 1 << 17
_TOLERANCE: Final = 0.003
# With fewer weights than this the coder's tables dominate the stream: the entropy of the codes serves as the rate.
_FEW: Final = 1 << 12
_MOST_PROBES: Final = 16
# From this many rows on steps are mixed; fewer rows take any float32 step.
_MIXED: Final = 16
_GOLDEN: Final = (math.sqrt(5) - 1) / 2  # the fractional parts of its multiples are evenly spread
_OCTAVE: Final = 8  # levels


def steps_at_level(level: float, finest: Steps) -> Steps:
    """A step for each row: 2^(level / 8) on average, but never finer than the row's finest.

    Args:
        level: in eighths of an octave.
        finest: the finest step of each row, float32 of (rows,); 0 for a row of zeros, which stays 0.

    >>> steps_at_level(-8.0, np.array([0.25, 0, 0.75], np.float32)).tolist()
    [0.5, 0.0, 0.75]
    """
    if len(finest) < _MIXED:
        step = np.maximum(finest, np.float32(2.0 ** (min(level, STEP_INDEXES[-1]) / _OCTAVE)))
    else:
        mixed = np.floor(level + np.arange(len(finest)) * _GOLDEN % 1).astype(np.int64)
        step = np.maximum(scale(np.clip(mixed, STEP_INDEXES[0], STEP_INDEXES[-1])), ceiling(finest))
    return np.where(finest > 0, step, np.float32(0))


def steps_at_rate(matrix: Array, bits: float, finest: Steps, codes: CodeType) -> Steps:
    """The steps at which the coded stream takes `bits` per weight; the finest steps, if these take less.

    Args:
        matrix: the weights, of (rows, columns).
        bits: the target, in bits per weight.
        finest: the finest step of each row, float32 of (rows,).
        codes: the type of the codes.
    """
    count = min(len(matrix), max(1, _SAMPLE // matrix.shape[1]))
    chosen = np.unique(np.linspace(0, len(matrix) - 1, count).astype(np.int64))
    part = np.ascontiguousarray(matrix[chosen, : max(1, _SAMPLE // len(chosen))])
    bound = finest[chosen]
    if not bound.any():
        return finest

    def rate(step: Steps) -> float:
        found = encode(part, step, codes)
        if matrix.size < _FEW:
            return entropy(found)
        parts = encode_codes(found, View((len(part), part.shape[1]), (0,)))
        return 8 * sum(len(one.payload) for one in parts.values()) / int(part.size)

    if rate(bound) <= bits:
        return finest
    spread = float(np.sqrt(np.mean(np.square(part.astype(np.float64)))))
    start = _OCTAVE * (math.log2(spread) + 2 - bits)  # the estimate for a normal distribution
    level = crossing(lambda level: rate(steps_at_level(level, bound)), bits, start, _TOLERANCE)
    return steps_at_level(level, finest)


def crossing(rate: Callable[[float], float], bits: float, level: float, tolerance: float) -> float:
    """The level at which a falling rate equals `bits`, by Newton steps with the slope of fine grids, else by bisection.

    >>> round(crossing(lambda level: 4 - level / 8, 3.0, 0.0, 0.01))
    8
    """
    low, high = -math.inf, math.inf
    best, miss = level, math.inf
    for _ in range(_MOST_PROBES):
        excess = rate(level) - bits
        if abs(excess) < abs(miss):
            best, miss = level, excess
        if abs(excess) <= tolerance:
            break
        low, high = (level, high) if excess > 0 else (low, level)
        level += _OCTAVE * max(-4.0, min(4.0, excess))  # one bit per octave
        if not low < level < high:
            level = (low + high) / 2
    return best
