"""How much memory reading a file may take: in proportion to the file, whatever is written in it."""

from __future__ import annotations

from typing import Final

from pared.errors import UnsafeError

_PER_BYTE: Final = 4
_LEAST: Final = 64 << 20  # roughly what Python and NumPy take before any file is opened


class MemoryLimit:
    """The memory that reading one file may take: four times its bytes, and 64 MiB.

    >>> MemoryLimit("file", 1000).affords(100 << 20)
    False
    """

    def __init__(self, where: str, nbytes: int) -> None:
        self.where = where
        self.left = _PER_BYTE * nbytes + _LEAST

    def affords(self, nbytes: int) -> bool:
        """Whether this many bytes are left."""
        return nbytes <= self.left

    def take(self, nbytes: int) -> None:
        """Count memory that is about to be taken.

        Raises:
            UnsafeError: less is left.
        """
        self.left -= nbytes
        if self.left < 0:
            raise UnsafeError(
                "reading it would take more memory than four times its size and 64 MiB",
                where=self.where,
                remedy="Do not use this file, unless you know who made it: it describes far more than it holds. If you "
                "do, save it again with fewer and larger tensors, or as .safetensors.",
            )

    def give(self, nbytes: int) -> None:
        """Count memory that is free again."""
        self.left += nbytes
