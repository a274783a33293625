"""Activations as unsigned codes, `value = scale * (code - zero_point)` with codes 0..levels (255 or 127).

Values are rounded to the nearest code, halves to the even one, by adding `ORIGIN` to a float32: numbers of that size
are 1 apart, so the lowest byte of the sum is the code. That is two to three times faster than rounding and converting,
because PyTorch converts float32 to uint8 one number at a time, but int32 to uint8 in vectors. Neither scratch memory
kept between calls nor working through the rows in pieces that fit the cache gained anything inside a model.
"""

from __future__ import annotations

import math
import threading
from typing import Final

import torch
from torch import Tensor

from pared.formats.activation import NARROWEST, float32

ORIGIN: Final = 1.5 * 2.0**23  # the middle of the float32 numbers that are 1 apart; its lowest byte is 0


class NotFiniteError(Exception):
    """An input holds NaN or Inf, for which a calibrated grid has no code: who calls a kernel computes in floats."""


class _Far(threading.local):
    """The last input in this thread that reached far beyond its grid: its root mean square, and the grid's end."""

    seen: tuple[float, float] | None = None


FAR: Final = _Far()


def quantize(x: Tensor, scale: float, zero_point: int, levels: int) -> Tensor:
    """The codes of `x` (float32, any shape and strides) as uint8, in new memory of the same format.

    Values beyond the grid get the code of its nearest end. If their root mean square lies beyond it, `FAR` tells.

    Raises:
        NotFiniteError: `x` holds NaN or Inf.

    >>> quantize(torch.tensor([-9.0, -1.0, 0.0, 0.6, 9.0]), 1.0, 1, 4).tolist()
    [0, 0, 1, 2, 4]
    """
    check(x, scale * max(zero_point, levels - zero_point))
    return codes_of(x, scale, zero_point, levels)


def codes_of(x: Tensor, scale: float, zero_point: int, levels: int, out: Tensor | None = None) -> Tensor:
    """As `quantize`, for values that were checked, written to `out` if it is given."""
    # `rsub` is ORIGIN + zero_point + x / scale in one pass.
    shifted = torch.rsub(x, ORIGIN + zero_point, alpha=-float32(1.0 / scale))
    codes = shifted.clamp_(ORIGIN, ORIGIN + levels).view(torch.int32)
    return codes.to(torch.uint8) if out is None else out.copy_(codes)


def check(x: Tensor, end: float) -> None:
    """Find NaN and Inf, and values far beyond a grid, by the energy: one pass, a tenth of what quantizing takes.

    Args:
        x: float32.
        end: the largest magnitude on the grid.

    Raises:
        NotFiniteError: `x` holds NaN or Inf.
    """
    if x.is_contiguous():
        flat = x.view(-1)
        energy = float(torch.dot(flat, flat))  # a third faster than the norm
    else:
        energy = float(torch.linalg.vector_norm(x)) ** 2
    if not math.isfinite(energy) and not x.isfinite().all():
        raise NotFiniteError
    tell_far(energy, x.numel(), end)


def tell_far(energy: float, numbers: int, end: float) -> None:
    """Let `FAR` tell of an input whose root mean square lies beyond its grid.

    Args:
        energy: the sum of the squares of its numbers.
        numbers: how many there are.
        end: the largest magnitude on the grid.
    """
    if energy > end * end * numbers:
        FAR.seen = math.sqrt(energy / numbers), end


def quantize_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of `x` (float32, rows x columns, at least one column), each row on the grid of its own range.

    Returns:
        the codes (uint8, rows x columns), the scales and the zero points (float32, rows x 1). A row that holds NaN or
        Inf has a scale that is not finite, so whatever is computed from it is not finite either.

    >>> codes, scale, zero_point = quantize_rows(torch.tensor([[-2.0, 0.0, 252.0], [0.0, 0.0, 0.0]]), 255)
    >>> codes.tolist(), scale[0].tolist(), zero_point[0].tolist()
    ([[0, 2, 254], [254, 254, 254]], [1.0], [2.0])
    """
    low, scale, inverse = _row_grids(x, levels)
    origin = torch.rsub(low.mul_(inverse), ORIGIN)
    codes = (x * inverse).add_(origin).view(torch.int32).to(torch.uint8)
    return codes, scale, origin.sub_(ORIGIN)


def _row_grids(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's lowest value (at most `-NARROWEST`), scale, and reciprocal of the scale."""
    low = x.amin(-1, keepdim=True).clamp_(max=-NARROWEST)
    high = x.amax(-1, keepdim=True).clamp_(min=0.0)
    # One level is kept free: both ends are rounded, so the codes of a row may span one step more than its range.
    scale = high.sub_(low).div_(levels - 1)
    return low, scale, scale.reciprocal()
