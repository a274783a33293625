"""A tensor to be rounded: what is known of it, and its rounding at given steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pared.fitting.calibration.blocks import Blocks
from pared.fitting.rounding.feedback import Factor, RowSteps, feedback
from pared.formats.coded import log_step
from pared.formats.grids import CODE_LIMITS, CodeType
from pared.formats.views import View

Floats = NDArray[np.float64]

STEPS_PER_OCTAVE: Final = 8  # steps are 2^(k / 8): a step index k counts eighths of an octave

# The largest code before feedback, which moves later columns: rows that then leave the type's range are rounded again.
HEADROOM: Final = {"int8": 120, "int16": 32000}
WEIGHTS_AT_ONCE: Final = 1 << 24  # that are rounded together
_RAISED_STEP: Final = 1.02  # factor that raises a step to the next one of the table, 2^(1/8) above


@dataclass(frozen=True, eq=False)
class RoundingTarget:
    """A tensor to be rounded, and what is known of it.

    Args:
        matrix: float32 (rows, columns): the tensor through its view. Where columns have scales, all else is of the
            matrix that is divided by them.
        view: which dimensions are rows.
        importance: float64 (rows,): damage if all elements of a row had an error of variance 1; above 0.
        exponents: int64 (rows,): by how many eighths of an octave a row's step exceeds the tensor's common step.
        factored: factor of the second moments of its inputs; None: rounding without feedback.
        judged: the factor from one half of the calls, which the other half judges; dropped once the curve is known.
        sampled: int64 (some,): the blocks of columns that the curve is of, and `judged`; None: all.
        layout: how the moments' blocks cover the matrix.
        absmax: float32 (rows,): the largest magnitude of each row.
        ceiling: float32 (rows,): no step is above this; None: steps may be as large as they like.
        scale: float32 (columns,): the scale of each column; None: columns have none.
    """

    matrix: Tensor
    view: View
    importance: Tensor
    exponents: Tensor
    factored: Factor | None
    judged: Factor | None
    layout: Blocks
    absmax: Tensor
    ceiling: Tensor | None = None
    sampled: Tensor | None = None
    scale: Tensor | None = None

    @functools.cached_property
    def mean_squares(self) -> Tensor:
        """The mean square of each row of what is rounded, float32 (rows,)."""
        rows = torch.arange(len(self.matrix)).split(max(1, WEIGHTS_AT_ONCE // max(self.matrix.shape[1], 1)))
        return torch.cat([self.some(some).square_().mean(1) for some in rows])

    def some(self, rows: Tensor) -> Tensor:
        """Some rows of what is rounded, at the indices int64 (some,): of the matrix, divided by the scales."""
        found = self.matrix[rows]
        return found if self.scale is None else found.div_(self.scale)

    def steps(self, common: int | Tensor, codes: CodeType) -> Tensor:
        """The rows' steps, 2^((common + exponents) / 8), or coarser where a code would leave its type.

        Args:
            common: index of the common step, in eighths of an octave; or several, int64 (some, 1).
            codes: "int8" or "int16".

        Returns:
            float32 (rows,), or (some, rows); 0 for rows that are zero.
        """
        # A little below the intended step of the table, so that rounding up finds it.
        wished = torch.exp2((common + self.exponents).double() / STEPS_PER_OCTAVE).mul_(1 - 1e-6).float()
        if self.ceiling is not None:
            wished = torch.minimum(wished, self.ceiling)
        least = self.absmax / HEADROOM[codes]
        return torch.where(self.absmax > 0, log_step(torch.maximum(wished, least)), torch.zeros_like(wished))


def narrowed(target: RoundingTarget, blocks: Tensor | None) -> RoundingTarget:
    """The same rows with some blocks of their columns, and without factors.

    Args:
        target: a tensor.
        blocks: int64 (some,): blocks that are full, ascending; None: all.
    """
    target = replace(target, factored=None, judged=None, sampled=None)
    if blocks is None:
        return target
    width = -(-target.matrix.shape[1] // target.layout.column_blocks)
    columns = (blocks[:, None] * width + torch.arange(width)).reshape(-1)
    layout, scale = Blocks(target.layout.groups, len(blocks)), target.scale
    return replace(
        target, matrix=target.matrix[:, columns], layout=layout, scale=None if scale is None else scale[columns]
    )


def of_blocks(layout: Blocks, moments: Tensor, blocks: Tensor | None) -> Tensor:
    """The moments of `narrowed`, float32 (groups * some, width, width)."""
    if blocks is None:
        return moments
    found: Tensor = moments.unflatten(0, (layout.groups, layout.column_blocks))[:, blocks].flatten(0, 1)
    return found


def ceilings(tensor: Tensor, view: View, normed: tuple[int, ...] | None) -> Tensor | None:
    """The coarsest step of each row at which no slice that is divided by its norm becomes zeros.

    Args:
        tensor: floating.
        view: which of its dimensions are rows.
        normed: see `ModelTensor.normed`.

    Returns:
        float32 (rows,); None if no slice is divided by its norm.

    >>> ceilings(torch.tensor([[4.0, 1.0], [0.5, 0.0]]), View((2, 2), (0,)), (0,))
    tensor([4.0000, 0.5000])
    >>> ceilings(torch.tensor([[4.0, 1.0], [0.5, 0.0]]), View((2, 2), ()), (0,))
    tensor([0.5000])
    """
    if normed is None:
        return None
    largest = _largest(tensor.detach(), normed)
    if normed == view.rows and view.split == tuple(tensor.shape):
        return largest
    live = largest[largest > 0]
    return torch.full((view.n_rows,), float(live.min()) if len(live) else 0.0)


def _largest(tensor: Tensor, normed: tuple[int, ...]) -> Tensor:
    """The largest magnitude of each slice, float32 (slices,)."""
    return _slices(tensor, normed).abs().amax(1).float()


def _slices(tensor: Tensor, normed: tuple[int, ...]) -> Tensor:
    return tensor.movedim(normed, tuple(range(len(normed)))).reshape(math.prod(tensor.shape[i] for i in normed), -1)


def without_empty_slices(codes: Tensor, tensor: Tensor, normed: tuple[int, ...] | None) -> Tensor:
    """The codes, where the largest number of a slice that feedback has emptied is 1 or -1.

    Args:
        codes: integers of the tensor's shape.
        tensor: what they stand for.
        normed: see `ModelTensor.normed`; None: nothing is changed.

    >>> without_empty_slices(torch.zeros(2, 2, dtype=torch.int8), torch.tensor([[4.0, 5.0], [0.0, 0.0]]), (0,)).tolist()
    [[0, 1], [0, 0]]
    """
    if normed is None:
        return codes
    slices = _slices(tensor.detach(), normed)
    empty = (_slices(codes, normed) == 0).all(1) & (slices != 0).any(1)
    if not bool(empty.any()):
        return codes
    places = _slices(torch.arange(codes.numel()).reshape(codes.shape), normed)[empty]
    largest = slices[empty].abs().argmax(1, keepdim=True)
    codes = codes.clone()
    codes.view(-1)[places.gather(1, largest)] = slices[empty].gather(1, largest).sign().to(codes.dtype)
    return codes


def solve(target: RoundingTarget, steps: Tensor, codes: CodeType) -> tuple[Tensor, Tensor]:
    """Round the whole matrix, with feedback if the target has a factor.

    Args:
        target: the tensor.
        steps: float32 (rows,), see `RoundingTarget.steps`.
        codes: "int8" or "int16".

    Returns:
        codes, int8 or int16 (rows, columns), and steps, float32 (rows,): raised where feedback drove a code out of its
        type.
    """
    limit = CODE_LIMITS[codes]
    kind = torch.int8 if codes == "int8" else torch.int16
    rounded = torch.empty(target.matrix.shape, dtype=kind)
    if target.factored is None:
        for some in at_once(target):
            rows = some.reshape(-1)
            rounded[rows] = round_rows(target.some(rows), steps[rows], limit).to(kind)
        return rounded, steps
    steps = steps.clone()
    for some in at_once(target):
        rows = some
        while rows.numel():
            part = round_with_feedback(target, rows, steps[rows], limit)
            rounded[rows] = part.to(kind)
            # Rows are independent: only those whose codes may have been clamped are rounded again, with a larger step.
            clamped = part.abs().amax(2) >= limit
            steps[rows[clamped]] = log_step(steps[rows[clamped]] * _RAISED_STEP)
            rows = _clamped_rows(rows, clamped)
    return rounded, steps


def at_once(target: RoundingTarget) -> Iterator[Tensor]:
    """Rows that are rounded together, to bound memory: int64 (some groups, rows of each), in order.

    Several whole groups, or a part of the rows of a large one.
    """
    columns, groups = target.matrix.shape[1], target.layout.groups
    rows = torch.arange(len(target.matrix)).reshape(groups, -1)
    most = max(1, WEIGHTS_AT_ONCE // max(columns, 1))
    for some in rows.split(max(1, most // max(rows.shape[1], 1))):
        yield from some.split(max(1, most // len(some)), dim=1)


def _clamped_rows(rows: Tensor, clamped: Tensor) -> Tensor:
    """Find equally many rows of each group that has clamped ones, among them all of these: int64 (some groups, rows).

    Args:
        rows: int64 (groups, rows of each).
        clamped: bool, likewise.
    """
    most = int(clamped.sum(1).max()) if clamped.numel() else 0
    first = clamped.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return rows.gather(1, first)[clamped.any(1)]


def round_rows(matrix: Tensor, steps: Tensor, limit: int) -> Tensor:
    """The nearest codes, float32 (rows, columns) of whole numbers; 0 in rows whose step is 0."""
    inverse = torch.where(steps > 0, steps.reciprocal(), torch.zeros_like(steps))
    return (matrix * inverse[:, None]).round_().clamp_(-limit, limit)


def round_with_feedback(target: RoundingTarget, rows: Tensor, steps: Tensor, limit: int) -> Tensor:
    """Round some rows with feedback.

    Args:
        target: the tensor, with a factor.
        rows: int64 (some groups, rows of each): as many rows of each of these groups.
        steps: float32, of these rows.
        limit: the largest magnitude of a code.

    Returns:
        codes, float32 (some groups, rows of each, columns) of whole numbers.
    """
    assert target.factored is not None
    whole, columns = target.layout, target.matrix.shape[1]
    layout = Blocks(len(rows), whole.column_blocks)
    factored = target.factored
    if layout.groups != whole.groups:
        factored = factored.some(blocks_of_groups(target, rows))
    blocks_of = layout.blocks(target.some(rows.reshape(-1)))
    by_row = RowSteps(layout.row_blocks(steps.reshape(-1)).contiguous(), limit)
    codes = feedback(blocks_of, factored, by_row)
    return layout.matrix(codes, columns).reshape(*rows.shape, columns)


def blocks_of_groups(target: RoundingTarget, rows: Tensor) -> Tensor:
    """The indices of the moments' blocks for some groups, int64; `rows` as for `round_with_feedback`."""
    size = len(target.matrix) // target.layout.groups
    columns = target.layout.column_blocks
    found: Tensor = ((rows[:, :1] // size) * columns + torch.arange(columns)).reshape(-1)
    return found
