"""Matrices rounded to grids without torch, in blocks of rows that fit a core's cache.

A matrix here is a two-dimensional NumPy array with one step for each row, of one of the types of `FLOATING`;
all arithmetic is in float32, as in `formats.Grid`, whose codes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from pared.errors import ModelError
from pared.files.threads import each
from pared.formats.dtypes import Array, as_floats
from pared.formats.streams import Steps
from pared.formats.views import View

# The sum of this many products of the largest codes, 255 * 127, still fits 32 bits.
MOST_COLUMNS: Final = (2**31 - 1) // (255 * 127)

CodeType = Literal["int8", "int16"]
CODE_LIMITS: Final[Mapping[str, int]] = {"int8": 127, "int16": 32767}  # magnitudes of codes: every grid is symmetric

# A step below the smallest normal float32 has lost precision: such rows are zero for every practical purpose.
_SMALLEST_STEP: Final = np.finfo(np.float32).tiny
_BLOCK: Final = 1 << 17  # numbers worked on at a time: half a megabyte of float32

T = TypeVar("T")
_Tile = tuple[slice, slice]


def tiles(shape: tuple[int, int], size: int = _BLOCK) -> Iterator[_Tile]:
    """Blocks that cover a matrix, of about `size` numbers each: some rows, or a part of a long row."""
    n_rows, n_columns = shape
    if not n_rows or not n_columns:
        return
    rows = max(1, size // n_columns)
    columns = n_columns if rows > 1 else size
    for row in range(0, n_rows, rows):
        for column in range(0, n_columns, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def magnitudes(matrix: Array, threads: int = 1) -> Steps:
    """The largest magnitude of each row, as float32; NaN where there is one.

    Args:
        matrix: of (rows, columns).
        threads: the number of threads to use.

    >>> magnitudes(np.array([[1, -2], [0, 0]], np.float32)).tolist()
    [2.0, 0.0]
    """

    def look(tile: _Tile) -> Steps:
        block = as_floats(matrix[tile])
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            highest: Steps = np.maximum(block.max(1), -block.min(1)).astype(np.float32, copy=False)
        return highest

    found = np.zeros(len(matrix), np.float32)
    for (rows, _), largest in _shared(look, matrix, threads):  # a long row has several tiles
        np.maximum(found[rows], largest, out=found[rows])
    return np.abs(found)  # a row of zeros has 0, not -0


def finest_steps(largest: Steps, codes: CodeType) -> Steps:
    """The finest step of each row at which no code exceeds the limit; 0 for rows of zeros.

    >>> finest_steps(np.array([1.27, 0], np.float32), "int8").tolist()
    [0.009999999776482582, 0.0]
    """
    step = largest / np.float32(CODE_LIMITS[codes])
    return np.where(step >= _SMALLEST_STEP, step, np.float32(0))


def encode(matrix: Array, step: Steps, codes: CodeType, threads: int = 1) -> NDArray[Any]:
    """Every number rounded to the nearest multiple of its row's step; codes beyond the limit are clamped.

    Args:
        matrix: of (rows, columns); NaN gets any code.
        step: float32 of (rows,); a step of 0 gives codes of 0.
        codes: the type of the codes.
        threads: the number of threads to use.

    Returns:
        codes of (rows, columns).

    >>> encode(np.array([[0.5, -1.0]], np.float32), np.array([0.5], np.float32), "int8").tolist()
    [[1, -2]]
    """
    found = np.empty(matrix.shape, codes)
    with np.errstate(divide="ignore"):
        inverse = np.where(step > 0, np.float32(1) / step, np.float32(0))[:, None]
    limit = np.float32(CODE_LIMITS[codes])

    def round_(tile: _Tile) -> None:
        block = as_floats(matrix[tile]).astype(np.float32, copy=False)
        with np.errstate(invalid="ignore"):  # NaN and inf: callers that care compare with what decodes
            scaled = block * inverse[tile[0]]
            np.rint(scaled, out=scaled)
            np.clip(scaled, -limit, limit, out=scaled)
            found[tile] = scaled

    _shared(round_, matrix, threads)
    return found


def decode(codes: NDArray[Any], step: Steps, view: View, scale: Steps | None = None) -> NDArray[np.float32]:
    """The values that codes stand for: `(step[row] * code) * scale[column]`, each product rounded to float32.

    Args:
        codes: in the tensor's shape.
        step: for each row of the view, of any shape with that number of elements.
        view: which dimensions are rows.
        scale: likewise for each column; None: all are 1.

    >>> decode(np.array([[1, -2]], np.int8), np.array([0.5], np.float32), View((1, 2), (0,))).tolist()
    [[0.5, -1.0]]
    """
    values = codes.reshape(view.split).astype(np.float32)
    values *= view.spread(step)
    if scale is not None:
        values *= view.across.spread(scale)
    return values.reshape(codes.shape)


def _shared(work: Callable[[_Tile], T], matrix: Array, threads: int) -> list[tuple[_Tile, T]]:
    """The results of `work` on every tile; each thread takes a run of tiles."""
    blocks = list(tiles((matrix.shape[0], matrix.shape[1])))
    if len(blocks) == 1:
        return [(blocks[0], work(blocks[0]))]
    bounds = [i * len(blocks) // threads for i in range(threads + 1)]
    runs = [blocks[begin:end] for begin, end in pairwise(bounds)]
    return [done for run in each(lambda run: [(tile, work(tile)) for tile in run], runs, most=threads) for done in run]


def refuse_damaged(array: Array, name: str) -> None:
    """Raise an error that says where a tensor holds NaN or an infinity.

    Raises:
        ModelError: always.
    """
    wrong = np.argwhere(~np.isfinite(array))
    value = "NaN" if np.isnan(array[tuple(wrong[0])]) else "an infinity"
    raise ModelError(
        f"holds {value} ({len(wrong):,} of {array.size:,} numbers are not finite, the first at {wrong[0].tolist()})",
        where=name,
        remedy="Repair the checkpoint or fetch it again: a compressed model cannot be better than its source.",
    )
