"""A tensor to be rounded: what is known of it, and its rounding at given steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pared.fitting.calibration.blocks import Blocks
from pared.fitting.rounding.feedback import Factor, feedback
from pared.formats.coded import log_step
from pared.formats.grids import CODE_LIMITS, CodeType
from pared.formats.views import View

Floats = NDArray[np.float64]

STEPS_PER_OCTAVE: Final = 8  # steps are 2^(k / 8): a step index k counts eighths of an octave

# The largest code before feedback, which moves later columns: rows that then leave the type's range are rounded again.
HEADROOM: Final = {"int8": 120, "int16": 32000}
_RAISED_STEP: Final = 1.02  # factor that raises a step to the next one of the table, 2^(1/8) above


@dataclass(frozen=True, eq=False)
class RoundingTarget:
    """A tensor to be rounded, and what is known of it.

    Args:
        matrix: float32 (rows, columns): the tensor through its view.
        view: which dimensions are rows.
        importance: float64 (rows,): damage if all elements of a row had an error of variance 1; above 0.
        exponents: int64 (rows,): by how many eighths of an octave a row's step exceeds the tensor's common step.
        factored: factor of the second moments of its inputs; None: rounding without feedback.
        judged: the factor from one half of the calls, which the other half judges; dropped once the curve is known.
        layout: how the moments' blocks cover the matrix.
        absmax: float32 (rows,): the largest magnitude of each row.
    """

    matrix: Tensor
    view: View
    importance: Tensor
    exponents: Tensor
    factored: Factor | None
    judged: Factor | None
    layout: Blocks
    absmax: Tensor

    def steps(self, common: int, codes: CodeType) -> Tensor:
        """The rows' steps, 2^((common + exponents) / 8), or coarser where a code would leave its type.

        Args:
            common: index of the common step, in eighths of an octave.
            codes: "int8" or "int16".

        Returns:
            float32 (rows,); 0 for rows that are zero.
        """
        # A little below the intended step of the table, so that rounding up finds it.
        wished = torch.exp2((common + self.exponents).double() / STEPS_PER_OCTAVE).mul_(1 - 1e-6).float()
        least = self.absmax / HEADROOM[codes]
        return torch.where(self.absmax > 0, log_step(torch.maximum(wished, least)), torch.zeros_like(wished))


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
    if target.factored is None:
        return round_rows(target.matrix, steps, limit).to(kind), steps
    rounded = torch.empty(target.matrix.shape, dtype=kind)
    rows = torch.arange(len(rounded))
    steps = steps.clone()
    while len(rows):
        part = round_with_feedback(target, rows, steps[rows], limit)
        rounded[rows] = part.to(kind)
        # Rows are independent: only those whose codes may have been clamped are rounded again, with a larger step.
        clamped = rows[part.abs().amax(1) >= limit]
        steps[clamped] = log_step(steps[clamped] * _RAISED_STEP)
        rows = clamped if target.layout.groups == 1 else _whole_groups(clamped, target)
    return rounded, steps


def _whole_groups(rows: Tensor, target: RoundingTarget) -> Tensor:
    """The indices of all rows in the groups of these rows, int64."""
    size = len(target.matrix) // target.layout.groups
    groups = torch.unique(rows // size)
    whole: Tensor = (groups[:, None] * size + torch.arange(size)).reshape(-1)
    return whole


def round_rows(matrix: Tensor, steps: Tensor, limit: int) -> Tensor:
    """The nearest codes, float32 (rows, columns) of whole numbers; 0 in rows whose step is 0."""
    inverse = torch.where(steps > 0, steps.reciprocal(), torch.zeros_like(steps))
    return (matrix * inverse[:, None]).round_().clamp_(-limit, limit)


def round_with_feedback(target: RoundingTarget, rows: Tensor, steps: Tensor, limit: int) -> Tensor:
    """Round some rows with feedback.

    Args:
        target: the tensor, with a factor.
        rows: int64: all rows of some groups, or any rows of a matrix that is one group.
        steps: float32, of these rows.
        limit: the largest magnitude of a code.

    Returns:
        codes, float32 (rows, columns) of whole numbers.
    """
    assert target.factored is not None
    whole = target.layout
    groups = len(rows) * whole.groups // len(target.matrix) if whole.groups > 1 else 1
    layout = Blocks(groups, whole.column_blocks)
    factored = target.factored
    if groups != whole.groups:
        size = len(target.matrix) // whole.groups
        chosen = rows[::size] // size
        blocks = (chosen[:, None] * whole.column_blocks + torch.arange(whole.column_blocks)).reshape(-1)
        factored = factored.some(blocks)
    blocks_of = layout.blocks(target.matrix[rows])
    codes = feedback(blocks_of, factored, layout.row_blocks(steps).contiguous(), limit)
    return layout.matrix(codes, target.matrix.shape[1])
