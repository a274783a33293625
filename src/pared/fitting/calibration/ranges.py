"""Which columns of a layer's input are outliers, which its static range leaves out."""

from __future__ import annotations

import bisect
from typing import Final

import torch
from torch import Tensor

from pared.formats.activation import Outliers

# A range may end at these shares of what was seen: sixteen to each halving, down to a 64th.
_SHARES: Final = tuple(2.0 ** (-i / 16) for i in range(97))

# At most one extra column for this number of columns: it makes the product longer by the same share.
COLUMNS_EACH: Final = 32
_MOST: Final = 16  # extra columns in all: more gain little


def without_outliers(lows: Tensor, highs: Tensor) -> tuple[float, float, Outliers]:
    """The narrowest range that needs only a few extra columns: at most one for every `COLUMNS_EACH`.

    Args:
        lows: float, (columns,): the least value of each column.
        highs: float, (columns,): the greatest value of each column.

    Returns:
        the ends of the range, which contains 0, and the columns outside it, each with its number of extra columns.

    >>> highs = torch.ones(64)
    >>> highs[5] = 2
    >>> without_outliers(-torch.ones(64), highs)
    (-1.0, 1.0, ((5, 1),))
    """
    most = min(len(lows) // COLUMNS_EACH, _MOST)
    low, high = min(float(lows.min()), 0.0), max(float(highs.max()), 0.0)
    below, above = _totals(-lows, -low), _totals(highs, high)
    ends = [
        (low * _SHARES[i], high * _SHARES[j])
        for i, fewer in enumerate(below)
        # Counts only grow as the range shrinks.
        if (j := bisect.bisect_right(above, most - fewer) - 1) >= 0
    ]
    low, high = min(ends, key=lambda range: range[1] - range[0])
    return low, high, _outliers(lows, low, -1) + _outliers(highs, high, 1)


def _totals(reach: Tensor, end: float) -> list[int]:
    """The number of extra columns at each share of an end.

    Args:
        reach: (columns,): how far each column reaches in the direction of the end.
        end: the end of the full range.
    """
    ends = torch.tensor(_SHARES, dtype=torch.float64)[:, None] * end
    totals: list[int] = _extra(reach, ends).sum(1).tolist()
    return totals


def _extra(reach: Tensor, end: Tensor | float) -> Tensor:
    """How many ranges of this length each column needs beyond the first; 0 where the range is empty."""
    return (reach.double() / end).nan_to_num(0.0, 0.0, 0.0).ceil().sub(1).clamp(min=0).long()


def _outliers(values: Tensor, end: float, sign: int) -> Outliers:
    counts = _extra(values * sign, end * sign)
    return tuple((int(column), sign * int(counts[column])) for column in counts.nonzero().flatten())
