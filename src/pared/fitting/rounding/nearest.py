"""Rounds a matrix to the nearest codes at a given rate. Pure mathematics: no modules, no files."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from pared.formats import entropy
from pared.formats.coded import Coded, Grid
from pared.formats.grids import CODE_LIMITS
from pared.formats.views import View

# Steps below the smallest normal float32 have lost precision: such rows count as zero.
_SMALLEST_STEP: Final = torch.finfo(torch.float32).tiny
# The rate is reached within this many bits per weight, or once the step is known to this ratio.
_RATE_TOLERANCE: Final = 0.01
_STEP_TOLERANCE: Final = 1.0005
# Above this many weights the rate is measured on evenly spaced rows, to save time.
_SAMPLED_WEIGHTS: Final = 1 << 19


def absmax_steps(tensor: Tensor, view: View, limit: int) -> Tensor:
    """The finest step of each row at which no code exceeds `limit`: `absmax(row) / limit`.

    Args:
        tensor: floating, any shape.
        view: which dimensions are rows.
        limit: the largest magnitude of a code, 127 or 32767.

    Returns:
        float32 of shape `view.row_sizes`; zero for rows that are zero.

    >>> absmax_steps(torch.tensor([[1.27, 0.0], [0.0, 0.0]]), View((2, 2), (0,)), 127)
    tensor([0.0100, 0.0000])
    """
    values = tensor.detach().reshape(view.split)
    absmax = values.abs().amax(view.columns).float() if view.columns else values.abs().float()
    step = (absmax / limit).reshape(view.row_sizes)
    return torch.where(step >= _SMALLEST_STEP, step, torch.zeros_like(step))


def nearest(tensor: Tensor, bits: float, view: View, ceiling: Tensor | None = None) -> Coded:
    """Round to the nearest point of the grid whose entropy-coded stream takes `bits` per weight.

    The step is the same for all rows (at a fixed rate this minimises the squared error of a high-resolution quantizer;
    Gersho 1979) but never finer than `absmax(row) / 127`, so that at 8 bits every row has its own finest int8 step.
    Above 8 bits the codes are int16 and the bound is `absmax(row) / 32767`.

    Args:
        tensor: floating, any shape, finite.
        bits: the rate, above 0 and below 16.
        view: which dimensions are rows.
        ceiling: float32 (rows,): no step is above this, even if that takes more bits; None: no limit.

    >>> w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> coded = nearest(w, 4, View((64, 64), (0,)))
    >>> 3.9 < 8 * entropy.cost(coded.parts["codes"].numpy()) / w.numel() < 4.1
    True
    """
    grid = Grid("int8") if bits <= 8 else Grid("int16")
    finest = absmax_steps(tensor, view, CODE_LIMITS[grid.codes])
    if bits == 8 or not bool((finest > 0).any()):
        return grid.encode(tensor, finest, view)
    steps = _steps_for_rate(tensor, bits, view, grid, finest)
    if ceiling is not None:
        steps = torch.minimum(steps, ceiling.reshape(steps.shape).clamp(min=_SMALLEST_STEP))
    return grid.encode(tensor, steps, view)


def _steps_for_rate(tensor: Tensor, bits: float, view: View, grid: Grid, finest: Tensor) -> Tensor:
    """Bisect the logarithm of the common step until the coded rate is `bits`."""
    matrix = view.matrix(tensor.detach())
    rows = finest.reshape(-1)
    if matrix.numel() > _SAMPLED_WEIGHTS:
        chosen = torch.linspace(0, len(matrix) - 1, max(1, _SAMPLED_WEIGHTS // matrix.shape[1])).long().unique()
        matrix, rows = matrix[chosen], rows[chosen]

    def steps(common: float, bound: Tensor) -> Tensor:
        # Rows of zeros keep their step of zero; other rows have the common step unless it is too fine.
        return torch.where(bound > 0, bound.clamp(min=common), bound)

    def rate(common: float) -> float:
        coded = grid.encode(matrix, steps(common, rows))
        return 8 * entropy.cost(coded.parts["codes"].numpy()) / matrix.numel()

    low = float(finest[finest > 0].min())
    high = 4 * CODE_LIMITS[grid.codes] * float(finest.max())  # every weight rounds to zero
    if rate(low) <= bits:
        return finest
    while high / low > _STEP_TOLERANCE:
        middle = math.sqrt(low * high)
        reached = rate(middle)
        if abs(reached - bits) <= _RATE_TOLERANCE:
            return steps(middle, finest)
        low, high = (middle, high) if reached > bits else (low, middle)
    return steps(high, finest)
