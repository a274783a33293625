"""The numbers of a file, within a budget of bytes: all of them, or evenly spaced rows."""

from __future__ import annotations

from typing import Final

import numpy as np

from pared.formats.dtypes import Array
from pared.readers.listing import ListedTensor, Listing

_BLOCK: Final = 1024  # neighbouring elements of a vector that are sampled together
_MOST_INFLATED: Final = 2  # a tensor that takes more than this many times the bytes of its file is not read
_COMPARED: Final = 1 << 20  # elements compared at a time


class Content:
    """Reads tensors of a file.

    Args:
        listing: what is in the file.
        most: the most bytes of tensor data to read in total; 0: read nothing; None: no limit.
    """

    def __init__(self, listing: Listing, most: int | None) -> None:
        self._listing = listing
        self._reads = most != 0
        self.total = sum(storage.nbytes for storage in listing.storages.values() if storage.content)
        self.share = 1.0 if most is None else min(1.0, most / max(1, self.total))

    @property
    def sampled(self) -> bool:
        """Whether only some of the numbers are read."""
        return self._reads and self.share < 1

    def array(self, held: ListedTensor) -> Array | None:
        """The numbers of a tensor, memory-mapped if possible.

        None if there are none, if nothing may be read, or if they would take far more memory than the file has bytes
        (expanded views, and compressed members that inflate without bound).
        """
        within = held.nbytes <= _MOST_INFLATED * self._listing.nbytes
        return self._listing.array(held) if self._reads and within else None

    def rows(self, held: ListedTensor) -> Array | None:
        """A tensor, or as many evenly spaced rows of it as the budget allows; of a vector, blocks instead of rows."""
        array = self.array(held)
        if array is None or not self.sampled or array.ndim == 0:
            return array
        if array.ndim == 1:
            array = array[: len(array) // _BLOCK * _BLOCK].reshape(-1, _BLOCK) if len(array) >= _BLOCK else array[None]
        return spread(array, max(1, int(len(array) * self.share)))

    def same(self, a: ListedTensor, b: ListedTensor) -> bool:
        """Whether two tensors of the same type and shape have the same bits, as far as they are read."""
        arrays = self.rows(a), self.rows(b)
        if arrays[0] is None or arrays[1] is None:
            return False
        first, second = (array.reshape(-1).view(f"u{array.itemsize}") for array in arrays if array is not None)
        return all(
            np.array_equal(first[start : start + _COMPARED], second[start : start + _COMPARED])
            for start in range(0, len(first), _COMPARED)
        )


def spread(array: Array, rows: int) -> Array:
    """That number of evenly spaced rows of an array, or all of them if it has no more.

    >>> spread(np.arange(10), 4).tolist()
    [0, 2, 5, 7]
    """
    return array if rows >= len(array) else array[np.arange(rows) * len(array) // rows]
