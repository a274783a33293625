"""Where the bytes of a file or of a model in memory are: one row per tensor, and the rows sum to the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 100  # of the text, in columns


@dataclass(frozen=True)
class Row:
    """What one tensor, or one other piece of a file, takes.

    Args:
        name: of the tensor; in parentheses for what is no tensor.
        shape: of the tensor; None for what is no tensor.
        format: a short name of what one number is: "grid int8", "float32".
        nbytes: in the file; 0 for a tensor whose numbers an earlier row already counts.
        because: the reason for the format, or for the bytes.
    """

    name: str
    shape: tuple[int, ...] | None
    format: str
    nbytes: int
    because: str = ""

    @property
    def elements(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape) if self.shape is not None else 0

    @property
    def bits(self) -> float:
        """Bits in the file for each number of the tensor; 0 for what holds no numbers.

        >>> Row("w", (4, 4), "grid int8", 14).bits
        7.0
        """
        return 8 * self.nbytes / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Ledger:
    """All bytes of a file, or of a model in memory.

    Args:
        file: its name.
        nbytes: exactly the sum of the rows.
        rows: tensors first, in the file's order, then what is no tensor.
        original_nbytes: the bytes of the same tensors in their source's types; None where no source is known.
    """

    file: str
    nbytes: int
    rows: tuple[Row, ...]
    original_nbytes: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """All bytes, the container's included, over all numbers; each number counts once, however often it is named."""
        elements = sum(row.elements for row in self.rows if row.nbytes or not row.because)
        return 8 * self.nbytes / elements if elements else 0.0

    def by_format(self) -> dict[str, int]:
        """The bytes of each format, the largest first."""
        totals: dict[str, int] = {}
        for row in self.rows:
            totals[row.format] = totals.get(row.format, 0) + row.nbytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))
