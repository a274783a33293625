"""How a weight's matrix is cut into blocks that have second moments of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import torch.nn.functional as F
from torch import Tensor

from pared.model.tensors import ModelTensor

# The most columns of a matrix of second moments, which then takes 64 MiB. Wider weights are cut into blocks.
WIDEST_BLOCK: Final = 4096
# A weight of few and long rows, or of many groups, has narrower blocks: its moments may take this many entries, or this
# many for each of its numbers.
_MOST_ENTRIES: Final = 1 << 22
_ENTRIES_PER_WEIGHT: Final = 16

K = TypeVar("K")


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


def blocks_of(tensor: ModelTensor) -> Blocks:
    """The groups of its rows, as the module says, and the least number of blocks of at most `WIDEST_BLOCK` columns."""
    groups = getattr(tensor.module, "groups", 1) if tensor.attribute == "weight" else 1
    if tensor.groups is not None:
        groups = tensor.groups
    if not isinstance(groups, int) or groups < 1 or tensor.view.n_rows % groups:
        groups = 1
    # The moments of all blocks together have about columns * width * groups entries.
    entries = max(_MOST_ENTRIES, _ENTRIES_PER_WEIGHT * tensor.tensor.numel())
    columns = tensor.view.n_columns
    widest = min(WIDEST_BLOCK, max(1, entries // (columns * groups)))
    return Blocks(groups, max(1, -(-columns // widest)))


def add_up(sums: dict[K, Tensor], key: K, value: Tensor) -> None:
    """Add a value to the sum of this key."""
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value.clone()


def by_name(sums: Mapping[tuple[str, ...], Tensor]) -> dict[str, Tensor]:
    """Sums of several tensors together, (tensors, ...), by their names, as those of each, which may be in several.

    >>> import torch
    >>> by_name({("a", "b"): torch.tensor([1, 2]), ("b",): torch.tensor([10])})
    {'a': tensor(1), 'b': tensor(12)}
    """
    found: dict[str, Tensor] = {}
    for names, values in sums.items():
        for name, value in zip(names, values, strict=True):
            add_up(found, name, value)
    return found


def complete(unseen: Tensor, moments: Tensor) -> None:
    """Put the moments of all samples, in place, where the unseen ones reached nothing: no error would cost anything.

    An expert may be for samples of one half only. Nothing is left of its moments to round with then, so that it is
    rounded without feedback, and no feedback is judged by what it was made from.

    Args:
        unseen: float32 (blocks, columns, columns): the second moments of one half.
        moments: those of both halves, likewise.
    """
    missed = unseen.diagonal(dim1=1, dim2=2).sum(1) == 0
    unseen[missed] = moments[missed]
