"""Outlier columns of a linear layer's input, whose values exceed its range: extra columns carry the excess.

A few columns of a transformer's inputs, sometimes a single one, are many times as large as all others, and a grid that
reaches them is too coarse for the rest. So the range excludes them. Such a column is clipped to the range, and extra
columns, which are multiplied by the same weights, carry what is left, one range each. This is outlier channel splitting
(Zhao et al., 2019, arXiv:1901.09504), except that a value is not divided evenly: all of its codes except one are exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pared.formats.activation import Outliers, Range, float32
from pared.runtime.kernels.activation import ORIGIN


@dataclass(frozen=True, eq=False)
class ExtraColumns:
    """Extra columns, and what each of them carries. Every tensor has one number per extra column.

    Args:
        columns: int64, the column of the input that it belongs to.
        shift: float32 whole numbers: the codes that the columns before it account for.
        origin: float32, `ORIGIN` plus the zero point minus `shift`.
        low, high: float32, `ORIGIN` plus its smallest and largest code: the zero point and an end of the grid.
        scale: the scale of the grid, which all columns share.
        zero_point: the zero point of the grid.
        reach: how many times as far as the grid an input reaches with all of its extra columns.
    """

    columns: Tensor
    shift: Tensor
    origin: Tensor
    low: Tensor
    high: Tensor
    scale: float
    zero_point: int
    reach: int = 1

    def codes(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The codes of the extra columns (uint8, (..., extra)) of an input (float32, (..., in)); in `out` if given."""
        rows = x.reshape(-1, x.shape[-1])  # picking columns from a matrix takes two thirds of the time
        shifted = torch.rsub(rows.index_select(1, self.columns), self.origin, alpha=-float32(1.0 / self.scale))
        # NaN has no code: the column itself gets 0, and the extra ones get nothing.
        shifted.clamp_(self.low, self.high).nan_to_num_(ORIGIN + self.zero_point)
        codes = shifted.view(torch.int32).view(*x.shape[:-1], len(self.columns))
        return codes.to(torch.uint8) if out is None else out.copy_(codes)

    def values(self, x: Tensor) -> Tensor:
        """What the extra columns carry (float32, (..., extra)) of a finite input (float32, (..., in)), in floats."""
        low, high = ((end - (ORIGIN + self.zero_point)) * self.scale for end in (self.low, self.high))
        return x.index_select(-1, self.columns).sub_(self.shift * self.scale).clamp_(low, high)


def columns_of(outliers: Outliers) -> list[int]:
    """The column of the input that each extra column belongs to, in their order.

    >>> columns_of(((7, 2), (1, -1)))
    [7, 7, 1]
    """
    return [column for column, _ in _each(outliers)]


def _each(outliers: Outliers) -> Iterator[tuple[int, int]]:
    """The column that each extra column belongs to, and how many ranges lie before it: negative below zero."""
    for column, count in outliers:
        for ranges in range(1, abs(count) + 1):
            yield column, ranges if count > 0 else -ranges


@functools.lru_cache(maxsize=4096)
def extra_columns(outliers: Outliers, span: Range, levels: int) -> ExtraColumns:
    """The extra columns of an input whose grid spans a range.

    >>> found = extra_columns(((0, 2), (1, -1)), Range(-10.0, 20.0), 30)
    >>> found.codes(torch.tensor([[55.0, -14.0], [5.0, 90.0]])).tolist()  # what is left: 35, 15 and -4
    [[30, 25, 6], [10, 10, 10]]
    """
    scale, zero_point = span.grid(levels)
    ranges = [count for _, count in _each(outliers)]
    above = [count > 0 for count in ranges]

    shift = [count * (levels - zero_point if count > 0 else zero_point) for count in ranges]

    def floats(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device="cpu")

    return ExtraColumns(
        columns=torch.tensor(columns_of(outliers), dtype=torch.int64, device="cpu"),
        shift=floats(shift),
        origin=floats([zero_point - codes for codes in shift]) + ORIGIN,
        low=floats([zero_point if up else 0 for up in above]) + ORIGIN,
        high=floats([levels if up else zero_point for up in above]) + ORIGIN,
        scale=scale,
        zero_point=zero_point,
        reach=1 + max(map(abs, ranges), default=0),
    )


def widened(columns: Tensor, outliers: Outliers) -> Tensor:
    """A matrix with its extra columns appended.

    >>> widened(torch.tensor([[1, 2, 3]]), ((2, 1),)).tolist()
    [[1, 2, 3, 3]]
    """
    return torch.cat([columns, columns[:, columns_of(outliers)]], 1) if outliers else columns
