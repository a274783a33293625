"""What graphs can hold of grids with groups: integers of 2, 4 or 8 bits, a step for each group, and zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from pared.formats.groups.grid import Floats, GroupGrid, Numbers

_BITS: Final = (2, 4, 8)


@dataclass(frozen=True, eq=False)
class Integers:
    """A matrix whose values are `step * (code - zero)`.

    Args:
        bits: the bits of a code in the file.
        group: the columns of a group; None: all.
        codes: int8 (rows, columns), from `-2^(bits - 1)`.
        steps: float32 (rows, groups).
        zeros: int8 (rows, groups), of as many bits; None: all are zero.
    """

    bits: int
    group: int | None
    codes: Numbers
    steps: Floats
    zeros: Numbers | None

    @classmethod
    def of(cls, grid: GroupGrid, parts: Mapping[str, Numbers]) -> Integers | None:
        """The same values; None if they are not whole multiples of steps.

        Nested steps become the products that they stand for.
        """
        if grid.zero == "least":
            return None
        bits = next(one for one in _BITS if one >= grid.bits)
        return cls(bits, grid.group, parts["codes"], grid.steps(parts), parts.get("zero"))

    @property
    def steps_are_half(self) -> bool:
        """Whether float16 holds every step."""
        with np.errstate(over="ignore"):
            return bool(np.array_equal(self.steps.astype(np.float16).astype(np.float32), self.steps))

    def unsigned(self, codes: Numbers) -> Numbers:
        """Codes, or zero points, from 0 to `2^bits - 1`, as uint8."""
        return (codes.astype(np.int16) + (1 << (self.bits - 1))).astype(np.uint8)

    def in_blocks(self, sizes: tuple[int, ...]) -> Integers | None:
        """The same with groups of the largest of these sizes that divides them; None if none does.

        >>> row = Integers(8, None, np.ones((1, 64), np.int8), np.ones((1, 1), np.float32), None)
        >>> (found := row.in_blocks((16, 32))) is not None and (found.group, found.steps.tolist())
        (32, [[1.0, 1.0]])
        """
        size = next((one for one in sorted(sizes, reverse=True) if not self.group or self.group % one == 0), None)
        if size is None:
            return None
        columns = self.codes.shape[1]
        times = (self.group or columns + -columns % size) // size
        blocks = -(-columns // size)

        def repeated(values: Numbers) -> Numbers:
            return np.repeat(values, times, axis=1)[:, :blocks]

        zeros = None if self.zeros is None else repeated(self.zeros)
        return Integers(self.bits, size, self.codes, repeated(self.steps), zeros)

    def rows(self, chosen: Numbers) -> Integers:
        """Only these rows."""
        zeros = None if self.zeros is None else self.zeros[chosen]
        return Integers(self.bits, self.group, self.codes[chosen], self.steps[chosen], zeros)
