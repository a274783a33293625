"""Whether numbers that are stored as floats lie on few evenly spaced levels: what a fake quantizer leaves behind.

This is a judgement, within the rounding of the numbers and wherever zero lies; `exact_grids` finds codes that give
every number back exactly.
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
_GROUPS: Final = (128, 64, 32)  # the groups that quantizers of weights offer
_LEAST_GROUP: Final = 8  # fewer numbers have a grid by chance
_TRIED: Final = 16  # groups that are looked at before all are
_CHUNK: Final = 1 << 17  # numbers sorted at a time: what a cache holds
_EPSILON: Final = {"float64": 2.0**-24, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-9}

# Of the groups that could tell (three distinct numbers or more), so many must be on a grid. In a small group of
# eight-bit codes no two may be neighbours, and the step is then missed; numbers of no grid fail nearly always.
_AGREEING: Final = 0.98
_TELLING: Final = 16  # how many groups must be able to tell, at least
_OFF: Final = 0.02  # how far from its level a number may be, in steps, beyond what the rounding of its type explains
_MOST_OFF: Final = 0.25  # farther, and anything would pass


@dataclass(frozen=True)
class Levels:
    """A uniform grid with a step for each row, column or group of a tensor.

    Args:
        levels: the most that any of them uses.
        per: what shares a step: "row", "column", "group of 32".
    """

    levels: int
    per: str

    def __str__(self) -> str:
        return f"at most {self.levels} levels per {self.per}"


def grid_of(array: Array, dtype: str) -> Levels | None:
    """The grid with the largest groups that all of a tensor's numbers are on; None if there is none.

    Args:
        array: as `Listing.array` gives it, of two or more dimensions.
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
    """A tensor as matrices whose rows may share a step, those with the largest groups first."""
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
    """How many levels a grid has on which the groups lie, a step for each; 0 if they lie on none.

    Args:
        groups: one in each row.
        dtype: of the elements.
        least: how many groups must be able to tell.
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
    """For each group the levels of the grid that it is on (0: none), and how many distinct numbers it has.

    The step is the least distance of two neighbours, or half of it, a third, a quarter: where codes are few, no two
    may be next to each other.
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
