"""The numbers of a file within a budget of bytes: all of them, or rows that are evenly spread."""

from __future__ import annotations

from typing import Final

import numpy as np

from pared.formats.dtypes import Array
from pared.readers.listing import Held, Listing

_BLOCK: Final = 1024  # elements of a vector that are sampled together
_MOST_INFLATED: Final = 2  # times the bytes of the file
_COMPARED: Final = 1 << 20  # elements that are compared at a time


class Content:
    """Reads tensors of a file.

    Args:
        listing: of the file.
        most: bytes of content that may be read in all; 0: nothing is read; None: no limit.
    """

    def __init__(self, listing: Listing, most: int | None) -> None:
        self._listing = listing
        self._reads = most != 0
        self.total = sum(storage.nbytes for storage in listing.storages.values() if storage.content)
        self.share = 1.0 if most is None else min(1.0, most / max(1, self.total))

    @property
    def sampled(self) -> bool:
        """Whether some numbers are read and others are not."""
        return self._reads and self.share < 1

    def array(self, held: Held) -> Array | None:
        """The numbers of a tensor, mapped where they can be.

        None where there are none, where none may be read, and where they would take far more memory than the file
        has bytes: expanded views, and members that inflate without bound.
        """
        within = held.nbytes <= _MOST_INFLATED * self._listing.nbytes
        return self._listing.array(held) if self._reads and within else None

    def rows(self, held: Held) -> Array | None:
        """A tensor, or as many evenly spread rows of it as the budget has room for; blocks, of a vector."""
        array = self.array(held)
        if array is None or not self.sampled or array.ndim == 0:
            return array
        if array.ndim == 1:
            array = array[: len(array) // _BLOCK * _BLOCK].reshape(-1, _BLOCK) if len(array) >= _BLOCK else array[None]
        return spread(array, max(1, int(len(array) * self.share)))

    def same(self, one: Held, other: Held) -> bool:
        """Whether two tensors of equal type and shape have the same bits, wherever they are read."""
        arrays = self.rows(one), self.rows(other)
        if arrays[0] is None or arrays[1] is None:
            return False
        first, second = (array.reshape(-1).view(f"u{array.itemsize}") for array in arrays if array is not None)
        return all(
            np.array_equal(first[start : start + _COMPARED], second[start : start + _COMPARED])
            for start in range(0, len(first), _COMPARED)
        )


def spread(array: Array, rows: int) -> Array:
    """So many evenly spread rows of an array; all, where it has no more.

    >>> spread(np.arange(10), 4).tolist()
    [0, 2, 5, 7]
    """
    return array if rows >= len(array) else array[np.arange(rows) * len(array) // rows]
