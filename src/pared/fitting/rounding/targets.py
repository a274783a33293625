"""A tensor that may go on a grid: what is known of it, and how it is rounded at given steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pared.fitting.calibration.blocks import Blocks
from pared.fitting.rounding.feedback import Factor, feedback
from pared.formats.coded import log_step
from pared.formats.grids import CODE_LIMITS
from pared.formats.views import View

STEPS_PER_OCTAVE: Final = 8  # of the scale that steps are on


CodeType = Literal["int8", "int16"]


Floats = NDArray[np.float64]


# The most that a code of int8 may reach before feedback: it moves later columns, and rows that leave the range are
# solved again.
HEADROOM: Final = {"int8": 120, "int16": 32000}


@dataclass(frozen=True, eq=False)
class RoundingTarget:
    """A tensor that may go on a grid, and what is known of it.

    Args:
        matrix: float32 (rows, columns): its view.
        view: of the tensor.
        importance: float64 (rows,): damage per unit variance of all elements of a row, shrunk and never zero.
        exponents: int64 (rows,): how many eighths of an octave a row's step is above the tensor's common one.
        factored: of its second moments; None: plain rounding.
        judged: the same from those calls that do not judge it; dropped when the curve is known.
        layout: of the moments' blocks.
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
        """The steps at a common exponent: 2^((common + exponent) / 8), or coarser where a code would leave its type.

        Returns:
            float32 (rows,); 0 for rows that are zero.
        """
        # A hair below the member of the table that is meant, so that rounding up finds it.
        wished = torch.exp2((common + self.exponents).double() / STEPS_PER_OCTAVE).mul_(1 - 1e-6).float()
        least = self.absmax / HEADROOM[codes]
        return torch.where(self.absmax > 0, log_step(torch.maximum(wished, least)), torch.zeros_like(wished))


def solve(target: RoundingTarget, steps: Tensor, codes: CodeType) -> tuple[Tensor, Tensor]:
    """Round the whole matrix.

    Returns:
        codes (rows, columns) of the type asked for, and the steps (rows,): raised where feedback drove a code out of
        its type.
    """
    limit = CODE_LIMITS[codes]
    kind = torch.int8 if codes == "int8" else torch.int16
    if target.factored is None:
        return round_rows(target.matrix, steps, limit).to(kind), steps
    found = torch.empty(target.matrix.shape, dtype=kind)
    rows = torch.arange(len(found))
    steps = steps.clone()
    while len(rows):
        part = round_with_feedback(target, rows, steps[rows], limit)
        found[rows] = part.to(kind)
        # Rows are independent: only those that may have been cut off are solved again, with a larger step.
        cut = part.abs().amax(1) >= limit
        rows = rows[cut] if target.layout.groups == 1 else _whole_groups(rows[cut], target)
        if len(rows) and target.layout.groups > 1:
            cut = (found[rows].abs() >= limit).any(1)
            steps[rows[cut]] = log_step(steps[rows[cut]] * _RAISE)
        else:
            steps[rows] = log_step(steps[rows] * _RAISE)
    return found, steps


_RAISE: Final = 1.02  # up to the next member of the table of steps


def _whole_groups(rows: Tensor, target: RoundingTarget) -> Tensor:
    """All rows of the groups that these rows belong to."""
    size = len(target.matrix) // target.layout.groups
    groups = torch.unique(rows // size)
    found: Tensor = (groups[:, None] * size + torch.arange(size)).reshape(-1)
    return found


def round_rows(matrix: Tensor, steps: Tensor, limit: int) -> Tensor:
    """The nearest codes, float32 (rows, columns)."""
    inverse = torch.where(steps > 0, steps.reciprocal(), torch.zeros_like(steps))
    return (matrix * inverse[:, None]).round_().clamp_(-limit, limit)


def round_with_feedback(target: RoundingTarget, rows: Tensor, steps: Tensor, limit: int) -> Tensor:
    """Feedback on some rows: all of some groups, or any of a matrix that is one group."""
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
