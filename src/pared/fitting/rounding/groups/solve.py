"""Matrices rounded to a grid with a step for each group of columns: first its steps are searched, then the codes.

The steps stay as they are while columns are rounded, since a step is needed as soon as the first column of its group is
rounded, and columns are rounded in the order of their second moments, not of their groups ("static groups").
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pared.fitting.calibration.blocks import Blocks
from pared.fitting.rounding.feedback import feedback
from pared.fitting.rounding.groups.columns import group_columns
from pared.fitting.rounding.targets import RoundingTarget, at_once, blocks_of_groups
from pared.formats.groups.grid import GroupGrid, Numbers, StepType
from pared.formats.groups.search import fitted, nearest

Parts = dict[str, Numbers]


def solve_in_groups(
    target: RoundingTarget, grid: GroupGrid, *, negative: bool = False, also: StepType | None = None
) -> Parts:
    """Round the whole matrix, with feedback if the target has a factor.

    Args:
        target: the tensor.
        grid: what it is rounded to.
        negative: whether steps may be negative where zero is fixed.
        also: a type that has to hold steps as well, see `fitted`.

    Returns:
        the grid's parts, see `GroupGrid.shapes`.
    """
    found = [round_in_groups(target, some, grid, negative=negative, also=also) for some in at_once(target)]
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def round_in_groups(
    target: RoundingTarget, rows: Tensor, grid: GroupGrid, *, negative: bool = False, also: StepType | None = None
) -> Parts:
    """Round some rows.

    Args:
        target: the tensor.
        rows: int64 (some groups, rows of each): as many rows of each of these groups.
        grid: what they are rounded to.
        negative: whether steps may be negative where zero is fixed.
        also: a type that has to hold steps as well.

    Returns:
        the grid's parts of these rows, in this order.
    """
    matrix = target.matrix[rows.reshape(-1)]
    columns = matrix.shape[1]
    layout = Blocks(len(rows), target.layout.column_blocks)
    factored = target.factored
    if factored is None:
        parts = fitted(matrix.numpy(), grid, negative=negative, also=also)
        return {"codes": nearest(matrix.numpy(), grid, parts), **parts}
    if layout.groups != target.layout.groups:
        factored = factored.some(blocks_of_groups(target, rows))
    # After feedback a column's error costs what later columns cannot make up for.
    cost = torch.empty_like(factored.remaining).scatter_(1, factored.order, factored.remaining).float()
    weights = cost.reshape(layout.groups, -1)[:, :columns]
    weights = weights[0] if layout.groups == 1 else weights.repeat_interleave(rows.shape[1], 0)
    parts = fitted(matrix.numpy(), grid, weights.numpy(), negative=negative, also=also)
    codes = feedback(layout.blocks(matrix), factored, group_columns(grid, parts, layout, columns))
    return {"codes": layout.matrix(codes, columns).to(torch.int8).numpy(), **parts}
