"""Whether numbers that are stored as floats lie on a few evenly spaced levels, as after fake quantization.

The test allows for the rounding of the numbers, and for any zero point; `formats.exact_grids` finds codes that restore
every number exactly, which is another question.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from pared.formats.dtypes import Array, as_floats
from pared.inspection.findings.content import spread

MOST_LEVELS: Final = 256  # of eight bits
_GROUPS: Final = (128, 64, 32)  # the usual group sizes of weight quantizers
_LEAST_GROUP: Final = 8  # fewer numbers lie on a grid by chance
_TRIED: Final = 16  # groups to test before all are tested
_CHUNK: Final = 1 << 17  # numbers sorted at a time, so that they fit the cache
_EPSILON: Final = {"float64": 2.0**-24, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-9}

# The least share of the groups with three or more distinct numbers that must lie on a grid. It is less than 1 because
# in a small group of eight-bit codes no two may be neighbours, and the step is then missed.
_AGREEING: Final = 0.98
_TELLING: Final = 16  # the least number of groups with three or more distinct numbers
_OFF: Final = 0.02  # the largest distance of a number from its level, in steps, beyond the rounding of its type
_MOST_OFF: Final = 0.25  # with a larger distance, any number would pass


@dataclass(frozen=True)
class Levels:
    """A uniform grid with a step for each row, column or group of a tensor.

    Args:
        levels: the largest number of levels that any of them uses.
        per: what shares a step: "row", "column" or "group of 32", for example.
    """

    levels: int
    per: str

    def __str__(self) -> str:
        return f"at most {self.levels} levels per {self.per}"


def grid_of(array: Array, dtype: str) -> Levels | None:
    """The grid with the largest groups on which all numbers of a tensor lie; None if there is none.

    Args:
        array: as `Listing.array` returns it, with two or more dimensions.
        dtype: one of `FLOATING`.

    >>> codes = np.random.default_rng(0).integers(-7, 8, (64, 256))
    >>> str(grid_of((codes * 0.013).astype(np.float32), "float32"))
    'at most 15 levels per row'
    >>> grid_of(np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32), "float32") is None
    True
    """
    for per, groups in _divisions(array):
        if groups.shape[1] < _LEAST_GROUP or len(groups) < 1:
            continue
        if _levels(spread(groups, _TRIED), dtype, least=1):
            levels = _levels(groups, dtype, least=min(_TELLING, len(groups)))
            if levels:
                return Levels(levels, per)
    return None


def _divisions(array: Array) -> Iterator[tuple[str, Array]]:
    """A tensor as matrices whose rows may share a step, those with the longest rows first."""
    yield "row", array.reshape(len(array), -1)
    yield "column", np.moveaxis(array, 1, 0).reshape(array.shape[1], -1)
    last = array.shape[-1]
    vectors = array.reshape(-1, last)
    if array.ndim > 2:
        yield "row of the last dimension", vectors
    for size in _GROUPS:
        if last > size:
            yield f"group of {size}", vectors[:, : last // size * size].reshape(-1, size)


def _levels(groups: Array, dtype: str, least: int) -> int:
    """The number of levels of a grid on which the groups lie, with a step for each group; 0 if there is no such grid.

    Args:
        groups: a matrix with a group in each row.
        dtype: the type of its elements.
        least: the least number of groups with three or more distinct numbers.
    """
    most = telling = agreeing = 0
    rows = max(1, _CHUNK // groups.shape[1])
    for start in range(0, len(groups), rows):
        levels, distinct = _fit(as_floats(groups[start : start + rows]), _EPSILON[dtype])
        tells = distinct >= 3
        telling += int(tells.sum())
        agreeing += int((levels[tells] > 0).sum())
        if agreeing < _AGREEING * telling:
            return 0
        most = max(most, int(levels.max(initial=0)))
    return most if telling >= least else 0


def _fit(groups: Array, epsilon: float) -> tuple[Array, Array]:
    """The number of levels of the grid of each group (0: it has none), and the number of its distinct values.

    The step is the smallest distance between neighbours, or a half, a third or a quarter of it: among few codes no
    two may be adjacent.
    """
    ordered = np.ascontiguousarray(np.sort(groups, axis=1).T)  # a group in each column: NumPy is faster along rows
    low, high = ordered[0], ordered[-1]
    span = high - low
    gaps = ordered[1:] - ordered[:-1]
    apart = gaps > span / (4 * MOST_LEVELS)
    distinct = 1 + np.count_nonzero(apart, axis=0)
    gap = np.where(apart, gaps, np.inf).min(axis=0, initial=math.inf)
    largest = np.maximum(-low, high)
    finite = np.isfinite(largest)
    levels = np.where(finite & (span == 0), 1, 0)
    waiting = np.flatnonzero(finite & (span > 0))
    for part in range(1, 5):
        steps = np.rint(part * span[waiting] / gap[waiting])
        possible = steps < MOST_LEVELS
        tried, steps = waiting[possible], steps[possible]
        if not tried.size:
            break
        numbers = ordered if tried.size == len(span) else ordered[:, tried]
        at = numbers - low[tried]
        at *= steps / span[tried]
        at -= np.rint(at)
        off = np.maximum(at.max(axis=0), -at.min(axis=0))
        allowed = np.minimum(_OFF + 2 * epsilon * largest[tried] * steps / span[tried], _MOST_OFF)
        levels[tried[off <= allowed]] = steps[off <= allowed].astype(levels.dtype) + 1
        waiting = tried[off > allowed]
    return levels, distinct
