"""Which columns of an input its static range leaves out."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from pared.formats.activation import Outliers

# A range may end at these shares of what was seen: sixteen to each halving, down to a 64th.
_SHARES: Final = tuple(2.0 ** (-i / 16) for i in range(97))


# One extra column for so many columns, at most: the product takes as much longer.
COLUMNS_EACH: Final = 32
_MOST: Final = 16  # in all: more gain little


def narrowed(lows: Tensor, highs: Tensor) -> tuple[float, float, Outliers]:
    """The narrowest range that takes a few extra columns: one for every `COLUMNS_EACH` at most.

    Args:
        lows: the least value of each column.
        highs: the greatest.

    Returns:
        The ends of the range, which holds zero, and the columns that leave it.

    >>> highs = torch.ones(64)
    >>> highs[5] = 2
    >>> narrowed(-torch.ones(64), highs)
    (-1.0, 1.0, ((5, 1),))
    """
    most = min(len(lows) // COLUMNS_EACH, _MOST)
    low, high = min(float(lows.min()), 0.0), max(float(highs.max()), 0.0)
    below, above = _totals(-lows, -low), _totals(highs, high)
    ends = [
        (low * _SHARES[i], high * _SHARES[j])
        for i, fewer in enumerate(below)
        # Counts only grow as the range shrinks.
        if (j := sum(fewer + one <= most for one in above) - 1) >= 0
    ]
    low, high = min(ends, key=lambda range: range[1] - range[0])
    return low, high, _outliers(lows, low, -1) + _outliers(highs, high, 1)


def _totals(reach: Tensor, end: float) -> list[int]:
    """For each share of an end, how many extra columns there are where columns reach so far."""
    ends = torch.tensor(_SHARES, dtype=torch.float64)[:, None] * end
    totals: list[int] = _further(reach, ends).sum(1).tolist()
    return totals


def _further(reach: Tensor, end: Tensor | float) -> Tensor:
    """How many ranges of that length each column takes beyond the first; none where the range is empty, as all are."""
    return (reach.double() / end).nan_to_num(0.0, 0.0, 0.0).ceil().sub(1).clamp(min=0).long()


def _outliers(values: Tensor, end: float, sign: int) -> Outliers:
    counts = _further(values * sign, end * sign)
    return tuple((int(column), sign * int(counts[column])) for column in counts.nonzero().flatten())
