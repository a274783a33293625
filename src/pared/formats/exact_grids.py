"""Tensors whose numbers lie on a grid already: weights that were fake-quantized, or dequantized, and stored as floats.

The grid is looked for on a few rows, where that is cheap: differences between neighbouring values give its step, or a
largest code that is usual does. It counts as found only if every number of the tensor comes back exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pared.formats import entropy
from pared.formats.dtypes import Array, as_floats, converted
from pared.formats.grids import CODE_LIMITS, CodeType
from pared.formats.streams import Steps
from pared.formats.views import View, matrix_of, restored

# The largest code of a row, where values say it no other way; 0: neighbouring values do.
_LARGEST: Final = np.array([0, 127, 8, 7, 128, 255])
_MOST: Final = 255  # levels to either side of zero: with a zero point of its own, a grid of 256 reaches so far
_GROUPS: Final = (32, 64, 128)  # neighbours in a row with a step of their own
_ROWS, _COLUMNS = 4, 2048  # that are looked at first
_ROUNDING: Final = 2.0**-16  # of the largest magnitude: what float32 may be off by, and its step too, with room
_BLOCK: Final = 1 << 19
_WHOLE: Final = {4: 2.0**24, 8: 2.0**53}  # the largest whole numbers of which every one has a float, by a float's bytes
_FIRST: Final = 64

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ExactGrid:
    """A tensor on the grid that it was made on.

    Args:
        view: which numbers share a step.
        codes: in the tensor's shape.
        step: one for each row of the view.
    """

    view: View
    codes: NDArray[Any]
    step: Steps


def find_exact_grid(array: Array, bits: float) -> ExactGrid | None:
    """The grid that all numbers of a tensor lie on; None if there is none, or if its codes take more bits.

    Args:
        array: two dimensions or more, one of the types of `FLOATING`; finite.
        bits: the most that a code may take.

    >>> weights = np.array([[3, -7, 8], [1, 2, 100]], np.float32) * np.array([[0.1], [0.3]], np.float32)
    >>> find_exact_grid(weights, 8).codes.tolist()
    [[3, -7, 8], [1, 2, 100]]
    """
    for view in _views(array.shape):
        for largest in _promising(array, view, bits):
            if (found := _whole(array, view, largest)) is not None:
                return found
    return None


def is_whole(array: Array) -> bool:
    """Whether all numbers are whole, as in masks and tables of indices: a model may use them as such.

    >>> is_whole(np.array([0.0, 1.0])), is_whole(np.array([0.5, 1.0]))
    (True, False)
    """
    flat = array.reshape(-1)
    edges = [0, _FIRST, *range(_BLOCK, flat.size, _BLOCK), flat.size]  # nearly always the first few tell
    blocks = (as_floats(flat[start:end]) for start, end in pairwise(edges))
    # Beyond, every float is whole, and says nothing.
    return all(bool(((np.rint(block) == block) & (abs(block) <= _WHOLE[block.itemsize])).all()) for block in blocks)


def whole_grid(array: Array) -> ExactGrid | None:
    """Whole numbers on the grid of step 1; None if they are not whole, or beyond 16 bits.

    >>> whole_grid(np.array([0.0, 1000.0])).codes.tolist()
    [0, 1000]
    """
    if not array.size or not is_whole(array) or abs(as_floats(array)).max() > CODE_LIMITS["int16"]:
        return None
    codes = np.ascontiguousarray(as_floats(array)).astype(np.int16).reshape(1, -1)
    return _exact_grid(View(array.shape, ()), codes, np.ones(1, np.float32), array.shape)


def _views(shape: tuple[int, ...]) -> Iterator[View]:
    """What may share a step: a row, everything, a column, a group of neighbours."""
    yield View(shape, (0,))
    yield View(shape, ())
    yield View(shape, (1,))
    for group in _GROUPS:
        if shape[-1] % group == 0 and shape[-1] > group:
            split = (*shape[:-1], shape[-1] // group, group)
            yield View(split, tuple(range(len(shape))))


def _promising(array: Array, view: View, bits: float) -> Iterator[int]:
    """Those of `_LARGEST` that explain some rows of a view, with codes of at most `bits` bits."""
    sample = _some(array, view).astype(np.float64)
    if sample.shape[1] < 2 or not sample.any():
        return
    # Nearly always none explains the first row, and trying all of them on it at once is cheaper than one after another.
    first = np.broadcast_to(sample[:1], (len(_LARGEST), sample.shape[1]))
    exact, _, _ = _tried(first, array.dtype, _LARGEST)
    for largest in _LARGEST[exact].tolist():
        found = _on_grid(sample, array.dtype, largest)
        if found is not None and entropy.entropy(found[0]) <= bits:
            yield largest


def _some(array: Array, view: View) -> Array:
    """A few rows of the view, and of long ones a part."""
    if not view.rows:
        flat: Array = array.reshape(1, -1) if array.flags.c_contiguous else array[:1].reshape(1, -1)
        stride = max(1, flat.shape[1] // (_ROWS * _COLUMNS))
        return flat[:, ::stride]
    if view.rows in ((0,), (1,)):
        (axis,) = view.rows
        chosen = sorted({i * (array.shape[axis] - 1) // (_ROWS - 1) for i in range(_ROWS)})
        rows: Array = np.moveaxis(np.take(array, chosen, axis), axis, 0).reshape(len(chosen), -1)
        return rows[:, :_COLUMNS]
    runs: Array = array.reshape(-1, view.split[-1])  # groups
    some: Array = runs[np.unique(np.linspace(0, len(runs) - 1, 16 * _ROWS).astype(int))]
    return some


def _whole(array: Array, view: View, largest: int) -> ExactGrid | None:
    """The grid of all numbers, by blocks of rows; None as soon as one of them is not on it."""
    if not view.rows:
        return _single(array, view)
    matrix = matrix_of(array, view)
    codes, step = np.empty(matrix.shape, np.int16), np.empty(len(matrix), np.float32)
    rows = max(1, _BLOCK // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        part = slice(start, start + rows)
        found = _on_grid(matrix[part].astype(np.float64), array.dtype, largest)
        if found is None:
            return None
        codes[part], step[part] = found
    return _exact_grid(view, codes, step, array.shape)


def _single(array: Array, view: View) -> ExactGrid | None:
    """A grid of one step, which the distinct magnitudes give."""
    matrix = array.reshape(1, -1)
    levels = np.zeros(0)
    for start in range(0, matrix.shape[1], _BLOCK):
        block = as_floats(matrix[:, start : start + _BLOCK])
        levels = np.union1d(levels, np.unique(abs(block)).astype(np.float64))
        if len(levels) > _MOST + 1:
            return None
    found = _on_grid(levels[None], array.dtype, 0)
    if found is None:
        return None
    by_level, step = found
    codes = np.empty(matrix.shape, np.int16)
    for start in range(0, matrix.shape[1], _BLOCK):
        block = matrix[:, start : start + _BLOCK].astype(np.float64)
        place = np.searchsorted(levels, abs(block))
        codes[:, start : start + _BLOCK] = by_level[0][place] * np.sign(block)
    return _exact_grid(view, codes, step, array.shape)


def _exact_grid(view: View, codes: NDArray[Any], step: Steps, shape: tuple[int, ...]) -> ExactGrid:
    kind: CodeType = "int8" if codes.min() >= -127 and codes.max() <= 127 else "int16"
    return ExactGrid(view, restored(codes.astype(kind), shape, view), step)


def _on_grid(rows: Floats, kind: np.dtype[Any], largest: int) -> tuple[NDArray[np.int16], Steps] | None:
    """The codes and the steps that give every number exactly; None if some row has none."""
    exact, codes, step = _tried(rows, kind, np.full(len(rows), largest))
    return (codes, step) if exact.all() else None


def _tried(
    rows: Floats, kind: np.dtype[Any], largest: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int16], Steps]:
    """Whether codes give every number of a row exactly, with the largest code given for it; these, and the steps.

    Codes and steps mean nothing where they do not, and there are none as soon as no row can have any.
    """
    magnitudes = abs(rows)
    top = magnitudes.max(1)
    codes_of_top = np.where(largest > 0, largest, _by_differences(magnitudes, top)) if (largest == 0).any() else largest
    guess = np.divide(top, codes_of_top, out=np.zeros_like(top), where=codes_of_top > 0)
    if kind.itemsize == 2:
        guess = _settled(magnitudes, guess)
    codes = np.rint(np.divide(magnitudes, guess[:, None], out=np.zeros_like(magnitudes), where=guess[:, None] > 0))
    may = (codes.max(1) <= _MOST) & _near(magnitudes, codes, guess, kind)
    if not may.any():
        return may, np.zeros(rows.shape, np.int16), np.zeros(len(rows), np.float32)
    codes[~may] = 0
    step = _refined(magnitudes, codes, guess, kind)
    signed = np.copysign(codes, rows)
    with np.errstate(over="ignore"):
        exact = converted(signed.astype(np.float32) * step[:, None], kind).astype(np.float64) == rows
    return may & exact.all(1), signed.astype(np.int16), step


def _settled(magnitudes: Floats, guess: Floats) -> Floats:
    """The guess, made better by small codes, then by larger ones: in 16 bits the largest alone tell little."""
    for largest in (8, 32, 128, _MOST):
        codes = np.rint(np.divide(magnitudes, guess[:, None], out=np.zeros_like(magnitudes), where=guess[:, None] > 0))
        codes[codes > largest] = 0
        weight = np.square(codes).sum(1)
        guess = np.divide((codes * magnitudes).sum(1), weight, out=guess.copy(), where=weight > 0)
    return guess


def _near(magnitudes: Floats, codes: Floats, guess: Floats, kind: np.dtype[Any]) -> NDArray[np.bool_]:
    """Whether the codes of a row can be right, which is found out exactly later: they miss it by rounding at most."""
    if kind.itemsize == 2:  # the rounding of 16 bits may be most of a step
        return np.ones(len(codes), np.bool_)
    off = abs(magnitudes - codes * guess[:, None])
    return np.asarray((off <= _ROUNDING * magnitudes.max(1)[:, None]).all(1))


def _by_differences(magnitudes: Floats, top: Floats) -> NDArray[np.int64]:
    """The code of each row's largest magnitude, if the least difference between two is a step; 0 where none can be."""
    ordered = np.sort(magnitudes, axis=1)
    differences = np.diff(ordered, axis=1, prepend=0)
    # Equal codes may differ by the rounding of their products; a step is much more, or there are too many levels.
    least = np.where(differences > top[:, None] / (4 * _MOST), differences, math.inf).min(1)
    codes = np.rint(np.divide(top, least, out=np.zeros_like(top), where=np.isfinite(least)))
    return np.where(codes <= _MOST, codes, 0).astype(np.int64)


def _refined(magnitudes: Floats, codes: Floats, guess: Floats, kind: np.dtype[Any]) -> Steps:
    """The step of each row that gives all magnitudes within their rounding, if there is one; else the guess."""
    computed = np.float32 if kind.itemsize == 8 else kind  # float64 was computed in float32
    with np.errstate(over="ignore"):
        half = np.spacing(magnitudes.astype(computed)).astype(np.float64) / 2
    below = np.where(np.frexp(magnitudes)[0] == 0.5, half / 2, half)  # a power of two has a nearer neighbour below
    some = codes > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.where(some, (magnitudes - below) / codes, 0).max(1)
        high = np.where(some, (magnitudes + half) / codes, math.inf).min(1)
    middle = np.where((low <= high) & np.isfinite(high), (low + np.where(np.isfinite(high), high, 0)) / 2, guess)
    if kind.itemsize == 2:
        return middle.astype(np.float32)
    plain = guess.astype(np.float32)
    # What made the numbers divided the largest magnitude; where that explains them too, it is what they were made with.
    return np.where((plain >= low) & (plain <= high), plain, middle.astype(np.float32))
