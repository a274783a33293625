"""The block types of GGUF: the grid of each, and its bytes as ggml-common.h lays them out.

A block is a run of consecutive columns of a row with everything that is needed to decode it. Its fields follow each
other without padding; a field is a function of the raised codes (from 0, uint8, (blocks, columns of a block)) and the
parts of the grid, and gives the bytes (blocks, n).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from pared.formats.groups.grid import GroupGrid, Numbers

Field = Callable[[Numbers, Mapping[str, Numbers]], Numbers]


@dataclass(frozen=True)
class Block:
    """A block type.

    Args:
        grid: the numbers.
        columns: the columns of a block.
        nbytes: the bytes of a block.
        fields: what a block consists of, in order.
    """

    grid: GroupGrid
    columns: int
    nbytes: int
    fields: tuple[Field, ...]

    def pack(self, parts: Mapping[str, Numbers]) -> Numbers:
        """The bytes of a matrix, uint8 (rows, bytes of a row).

        Args:
            parts: what the grid consists of (`GroupGrid.shapes`); the number of columns is a multiple of `columns`.
        """
        rows = parts["codes"].shape[0]
        raised = (parts["codes"].astype(np.int16) - self.grid.low).astype(np.uint8).reshape(-1, self.columns)
        return np.concatenate([field(raised, parts) for field in self.fields], axis=1).reshape(rows, -1)


def _bits(first: int, count: int, apart: int) -> Field:
    """Some bits of each code, from bit `first`: a byte holds those of codes that stand `apart` from each other."""

    def field(raised: Numbers, _: Mapping[str, Numbers]) -> Numbers:
        cut = (raised >> first) & ((1 << count) - 1)
        return _joined(cut, count, apart)

    return field


def _joined(values: Numbers, count: int, apart: int) -> Numbers:
    """Values of `count` bits in bytes, the lowest bits first."""
    each = 8 // count
    shifts = (np.arange(each, dtype=np.uint8) * count)[:, None]
    shifted = values.reshape(len(values), -1, each, apart) << shifts
    joined: Numbers = np.bitwise_or.reduce(shifted, axis=2).reshape(len(values), -1)
    return joined


def _signed(raised: Numbers, _: Mapping[str, Numbers]) -> Numbers:
    """Codes of 8 bits as they were."""
    return raised ^ 128


def _step(_: Numbers, parts: Mapping[str, Numbers]) -> Numbers:
    return _half(parts["step"])


def _least(_: Numbers, parts: Mapping[str, Numbers]) -> Numbers:
    return _half(parts["least"])


def _depth(_: Numbers, parts: Mapping[str, Numbers]) -> Numbers:
    """What types with nested steps subtract: the least values with the opposite sign."""
    return _half(-parts["least"])


def _half(values: Numbers) -> Numbers:
    halves: Numbers = np.ascontiguousarray(values.astype(np.float16)).reshape(-1, 1).view(np.uint8)
    return halves


def _multiples(parts: Mapping[str, Numbers], name: str, groups: int) -> Numbers:
    multiples: Numbers = parts[name].reshape(-1, groups)
    return multiples


def _eight_bit_multiples(_: Numbers, parts: Mapping[str, Numbers]) -> Numbers:
    """Q6_K: sixteen signed bytes."""
    return np.ascontiguousarray(_multiples(parts, "multiple", 16)).view(np.uint8)


def _four_bit_pairs(_: Numbers, parts: Mapping[str, Numbers]) -> Numbers:
    """Q2_K: a byte for each group, the multiple of the step in its low half."""
    low, high = (_multiples(parts, name, 16).astype(np.uint8) for name in ("multiple", "least multiple"))
    return low | (high << 4)


def _six_bit_multiples(_: Numbers, parts: Mapping[str, Numbers]) -> Numbers:
    """Q3_K: sixteen multiples, raised by 32; the low halves of two in a byte, then the upper two bits of four."""
    raised = (_multiples(parts, "multiple", 16).astype(np.int16) + 32).astype(np.uint8)
    return np.concatenate([_joined(raised & 15, 4, 8), _joined(raised >> 4, 2, 4)], axis=1)


def _six_bit_pairs(_: Numbers, parts: Mapping[str, Numbers]) -> Numbers:
    """Q4_K, Q5_K: eight pairs in twelve bytes; of the last four, the upper two bits stand in the first eight bytes."""
    step, least = (_multiples(parts, name, 8).astype(np.uint8) for name in ("multiple", "least multiple"))
    first = [values[:, :4] | (values[:, 4:] >> 4 << 6) for values in (step, least)]
    return np.concatenate([*first, (step[:, 4:] & 15) | ((least[:, 4:] & 15) << 4)], axis=1)


_SIXTEENS: Final = (_bits(0, 4, 16),)
_FIFTH_AND_SIXTEENS: Final = (_bits(4, 1, 1), *_SIXTEENS)

# From fine to coarse.
BLOCKS: Final[Mapping[str, Block]] = {
    "Q8_0": Block(GroupGrid(8, 32), 32, 34, (_step, _signed)),
    "Q6_K": Block(
        GroupGrid(6, 16, nested=16, multiple_bits=8, signed=True),
        *(256, 210),
        (_bits(0, 4, 64), _bits(4, 2, 32), _eight_bit_multiples, _step),
    ),
    "Q5_1": Block(GroupGrid(5, 32, "least"), 32, 24, (_step, _least, *_FIFTH_AND_SIXTEENS)),
    "Q5_K": Block(
        GroupGrid(5, 32, "least", nested=8, multiple_bits=6),
        *(256, 176),
        (_step, _depth, _six_bit_pairs, _bits(4, 1, 32), _bits(0, 4, 32)),
    ),
    "Q5_0": Block(GroupGrid(5, 32), 32, 22, (_step, *_FIFTH_AND_SIXTEENS)),
    "Q4_1": Block(GroupGrid(4, 32, "least"), 32, 20, (_step, _least, *_SIXTEENS)),
    "Q4_K": Block(
        GroupGrid(4, 32, "least", nested=8, multiple_bits=6),
        *(256, 144),
        (_step, _depth, _six_bit_pairs, _bits(0, 4, 32)),
    ),
    "Q4_0": Block(GroupGrid(4, 32), 32, 18, (_step, *_SIXTEENS)),
    "Q3_K": Block(
        GroupGrid(3, 16, nested=16, multiple_bits=6, signed=True),
        *(256, 110),
        (_bits(2, 1, 32), _bits(0, 2, 32), _six_bit_multiples, _step),
    ),
    "Q2_K": Block(
        GroupGrid(2, 16, "least", nested=16, multiple_bits=4),
        *(256, 84),
        (_four_bit_pairs, _bits(0, 2, 32), _step, _depth),
    ),
}
