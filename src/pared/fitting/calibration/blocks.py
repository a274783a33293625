"""How a weight's matrix is cut into blocks that have second moments of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """How a weight's matrix is cut into blocks that have second moments of their own.

    Args:
        groups: the number of groups of rows, each with inputs of its own, as in grouped convolutions.
        column_blocks: the number of blocks of columns, more than one where one factor would be too wide.
    """

    groups: int = 1
    column_blocks: int = 1

    def blocks(self, matrix: Tensor) -> Tensor:
        """(rows, columns) as (groups * column_blocks, rows / groups, columns / column_blocks), padded with zeros.

        >>> import torch
        >>> Blocks(2, 1).blocks(torch.arange(4).reshape(4, 1)).tolist()
        [[[0], [1]], [[2], [3]]]
        >>> Blocks(1, 2).blocks(torch.ones(1, 3)).tolist()
        [[[1.0, 1.0]], [[1.0, 0.0]]]
        """
        rows, columns = matrix.shape
        width = -(-columns // self.column_blocks)
        filled = F.pad(matrix, (0, self.column_blocks * width - columns))
        split = filled.reshape(self.groups, rows // self.groups, self.column_blocks, width)
        return split.transpose(1, 2).reshape(self.groups * self.column_blocks, rows // self.groups, width)

    def matrix(self, blocks: Tensor, columns: int) -> Tensor:
        """The inverse of `blocks`: (rows, columns), without the padding."""
        _, rows, width = blocks.shape
        split = blocks.reshape(self.groups, self.column_blocks, rows, width).transpose(1, 2)
        return split.reshape(self.groups * rows, self.column_blocks * width)[:, :columns]

    def row_blocks(self, per_row: Tensor) -> Tensor:
        """One number per row, (rows,), as (groups * column_blocks, rows / groups)."""
        split = per_row.reshape(self.groups, 1, -1).expand(-1, self.column_blocks, -1)
        return split.reshape(self.groups * self.column_blocks, -1)
