"""Columns rounded to a grid with a step for each group of them: the quantizer of such grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pared.fitting.calibration.blocks import Blocks
from pared.formats.groups.grid import GroupGrid, Numbers


@dataclass(frozen=True, eq=False)
class GroupColumns:
    """A `GroupGrid` for the blocks of a matrix: a value is `step * (code - zero) + base`, with these of its group.

    Args:
        step: float32 (blocks, groups, rows).
        inverse: their reciprocals; 0 where a step is 0.
        zero: the codes at which a value is the base, likewise; None: 0.
        base: float32, likewise; None: 0.
        group_of: int64 (blocks, columns): the group of each column of a block.
        low: the least code.
        high: the largest code.
    """

    step: Tensor
    inverse: Tensor
    zero: Tensor | None
    base: Tensor | None
    group_of: Tensor
    low: int
    high: int

    def round(self, column: Tensor, index: Tensor, codes: Tensor, error: Tensor) -> None:
        """Round a column, see `Quantizer`."""
        place: tuple[slice | Tensor, int | Tensor] = slice(None), int(self.group_of[0, index[0]])  # without a copy
        if len(index) > 1:
            blocks = torch.arange(len(index), device=index.device)
            place = blocks, self.group_of[blocks, index]
        raised = column if self.base is None else column - self.base[place]
        torch.mul(raised, self.inverse[place], out=codes)
        codes.round_()
        if self.zero is None:
            codes.clamp_(self.low, self.high)
            torch.addcmul(raised, codes, self.step[place], value=-1, out=error)
        else:
            zero = self.zero[place]
            codes.add_(zero).clamp_(self.low, self.high)
            torch.addcmul(raised, codes - zero, self.step[place], value=-1, out=error)

    def on(self, kind: str) -> GroupColumns:
        """The same on a kind of device."""
        zero, base = (None if one is None else one.to(kind) for one in (self.zero, self.base))
        step, inverse, group_of = self.step.to(kind), self.inverse.to(kind), self.group_of.to(kind)
        return replace(self, step=step, inverse=inverse, zero=zero, base=base, group_of=group_of)


def group_columns(grid: GroupGrid, parts: Mapping[str, Numbers], layout: Blocks, columns: int) -> GroupColumns:
    """The quantizer of a grid for a matrix that is cut into blocks.

    Args:
        grid: the grid.
        parts: its numbers for the whole matrix, see `GroupGrid.shapes`; "codes" are not needed.
        layout: how the matrix is cut.
        columns: those of the matrix.
    """
    step = _by_block(torch.from_numpy(grid.steps(parts)), layout)
    live = step != 0
    inverse = step.reciprocal()
    inverse[~inverse.isfinite()] = 0  # of a step of 0, and of one so small that its codes do not matter
    zero = base = None
    if grid.zero == "code":
        zero = _by_block(torch.from_numpy(parts["zero"]).float(), layout) * live
    elif grid.zero == "least":
        zero = torch.full_like(step, grid.low)
        base = _by_block(torch.from_numpy(grid.leasts(parts)), layout)
    width = -(-columns // layout.column_blocks)
    first = torch.arange(layout.column_blocks).repeat(layout.groups)[:, None] * width
    # Columns that only fill the last block up count with the last group.
    column = (first + torch.arange(width)).clamp(max=columns - 1)
    return GroupColumns(step, inverse, zero, base, column // (grid.group or columns), grid.low, grid.high)


def _by_block(per_group: Tensor, layout: Blocks) -> Tensor:
    """(rows, groups of columns) as (blocks, groups of columns, rows of a block)."""
    split = per_group.reshape(layout.groups, 1, -1, per_group.shape[1]).expand(-1, layout.column_blocks, -1, -1)
    return split.reshape(layout.groups * layout.column_blocks, -1, per_group.shape[1]).transpose(1, 2).contiguous()
