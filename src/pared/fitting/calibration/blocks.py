"""How a wide weight's columns, or a grouped one's rows, are cut into blocks with second moments of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a weight's matrix is cut into blocks with second moments of their own.

    Args:
        groups: of rows, as in grouped convolutions: each has inputs of its own.
        parts: of columns, where there are too many for one factor.
    """

    groups: int = 1
    parts: int = 1

    def blocks(self, matrix: Tensor) -> Tensor:
        """(rows, columns) as (groups * parts, rows / groups, columns / parts); zeros fill the last part.

        >>> Layout(2, 1).blocks(torch.arange(4).reshape(4, 1)).tolist()
        [[[0], [1]], [[2], [3]]]
        >>> Layout(1, 2).blocks(torch.ones(1, 3)).tolist()
        [[[1.0, 1.0]], [[1.0, 0.0]]]
        """
        rows, columns = matrix.shape
        width = -(-columns // self.parts)
        filled = F.pad(matrix, (0, self.parts * width - columns))
        split = filled.reshape(self.groups, rows // self.groups, self.parts, width)
        return split.transpose(1, 2).reshape(self.groups * self.parts, rows // self.groups, width)

    def matrix(self, blocks: Tensor, columns: int) -> Tensor:
        """The inverse of `blocks`: so many columns."""
        _, rows, width = blocks.shape
        split = blocks.reshape(self.groups, self.parts, rows, width).transpose(1, 2)
        return split.reshape(self.groups * rows, self.parts * width)[:, :columns]

    def row_blocks(self, per_row: Tensor) -> Tensor:
        """One number per row as (groups * parts, rows / groups)."""
        split = per_row.reshape(self.groups, 1, -1).expand(-1, self.parts, -1)
        return split.reshape(self.groups * self.parts, -1)
