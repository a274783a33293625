"""The steps of groups that cost least squared error, and the codes nearest to given numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pared.files.threads import each
from pared.formats.dtypes import Array, as_floats
from pared.formats.grids import tiles
from pared.formats.groups.grid import Floats, GroupGrid, Numbers, StepType, storable, storable_steps
from pared.formats.groups.nesting import share
from pared.formats.groups.solving import EXACT, Best, Groups, Pair, fit_lines, fit_steps, laid_out, units

Storing = Callable[[Floats, StepType, StepType | None], Floats]

# Where the offset of a group is this many steps, float32 is too coarse for the difference to it.
_FAR: Final = 1 << 13
_BLOCK: Final = 1 << 17  # numbers worked on at a time: fewer, and calls of NumPy take longer than their work

# The steps that are tried for a group: the finest that cuts nothing off, divided by these. By the bits of a code.
_SHARES: Final[Mapping[int, tuple[float, float, int]]] = {
    2: (0.5, 2.3, 24),
    3: (0.7, 1.7, 20),
    4: (0.8, 1.4, 18),
    5: (0.88, 1.25, 14),
    6: (0.94, 1.12, 12),
    7: (0.97, 1.06, 8),
    8: (0.985, 1.03, 6),
}
_SAMPLE: Final = 64  # groups, on which a matrix shows whether it is on a grid already


def nearest(matrix: Array, grid: GroupGrid, parts: Mapping[str, Numbers]) -> NDArray[np.int8]:
    """Every number rounded to the nearest that its group has.

    Numbers that `grid.decode` gave, with these parts, get codes that decode to the same again.

    Args:
        matrix: (rows, columns), of one of the types of `FLOATING`; finite.
        grid: the grid.
        parts: all but "codes".

    >>> nearest(np.array([[0.5, -1.0, 0.7]], np.float32), GroupGrid(4, 2), {"step": np.array([[0.5, 0.25]])}).tolist()
    [[1, -2, 3]]
    """
    step, offset = grid.steps(parts), grid.offsets(parts)
    far = offset is not None and bool((np.abs(offset) > _FAR * np.abs(step)).any())
    kind: Any = np.float64 if far else np.float32
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / step.astype(kind)
    inverse[~np.isfinite(inverse)] = 0  # of a step of 0, and of one so small that its codes do not matter
    zero = None
    if grid.zero == "code":
        zero = np.where(step != 0, parts["zero"], 0).astype(kind)
    elif grid.zero == "least":
        zero = np.full(step.shape, grid.low, kind)
    codes = np.empty(matrix.shape, np.int8)
    group = grid.group or max(matrix.shape[1], 1)
    for rows, columns in tiles((matrix.shape[0], matrix.shape[1])):
        first = columns.start or 0
        block = as_floats(matrix[rows, columns]).astype(kind)
        of_column = np.arange(first, first + block.shape[1]) // group
        if grid.zero == "least":
            block -= grid.leasts(parts)[rows][:, of_column]
        block *= inverse[rows][:, of_column]
        np.rint(block, out=block)
        if zero is not None:
            block += zero[rows][:, of_column]
        np.clip(block, grid.low, grid.high, out=block)
        codes[rows, columns] = block
    return codes


def fitted(
    matrix: Array,
    grid: GroupGrid,
    weights: Floats | None = None,
    threads: int = 1,
    *,
    negative: bool = False,
    also: StepType | None = None,
) -> dict[str, Numbers]:
    """All parts but "codes", chosen for least squared error.

    No step does worse than the finest one that cuts nothing off. A matrix that is on such a grid already, with steps
    that are representable, is found to be.

    Args:
        matrix: (rows, columns), of one of the types of `FLOATING`; finite.
        grid: the grid.
        weights: the importance of a squared error, float32 (columns,) or (rows, columns); None: all the same.
        threads: the number of threads to use.
        negative: whether steps may be negative where zero is fixed: codes reach one farther below zero than above,
            and then the far side serves whichever numbers need it. Where multiples are signed, they may be anyway.
        also: a type that has to hold steps and least values as well as `grid.step` does; not of nested ones.

    >>> fitted(np.array([[0.5, -1.0, 0.75, -1.75]], np.float32), GroupGrid(4, 2))["step"].tolist()
    [[0.5, 0.25]]
    """
    rows, columns = matrix.shape
    if not matrix.size:
        kinds = {"step": np.float32, "least": np.float32, "zero": np.int8}
        multiples = np.int8 if grid.signed else np.uint8
        return {
            name: np.zeros(size, kinds.get(name, multiples))
            for name, size in grid.shapes(rows, columns).items()
            if name != "codes"
        }
    negative = grid.zero == "fixed" and (negative or grid.signed)
    exact = _is_on_grid(matrix, grid, negative, also)
    step = max(1, _BLOCK // columns)

    def work(first: int) -> dict[str, Numbers]:
        chosen = slice(first, first + step)
        return _of_rows(
            as_floats(matrix[chosen]).astype(np.float32, copy=False),
            weights if weights is None or weights.ndim == 1 else weights[chosen],
            grid,
            negative,
            also,
            exact=exact,
        )

    found = each(work, range(0, rows, step), most=threads)
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def _of_rows(
    block: Floats, weights: Floats | None, grid: GroupGrid, negative: bool, also: StepType | None, *, exact: bool
) -> dict[str, Numbers]:
    """The parts of some rows."""
    rows, columns = block.shape
    size = grid.group or columns
    numbers = laid_out(block, size)
    unit = units(numbers)
    numbers = numbers / unit
    groups = Groups(numbers, _laid_out_weights(weights, block.shape, size))
    best = _best(groups, grid, unit, negative, also, exact=exact)
    if grid.nested:
        tried = [best, *([_best(groups, grid, unit, negative, also, exact=False)] if exact else [])]
        return share(groups, tried, grid, unit, rows)
    parts: dict[str, Numbers] = {"step": (best.step * unit).reshape(rows, -1)}
    if grid.zero == "code":
        parts["zero"] = np.where(best.step != 0, best.least, 0).astype(np.int8).reshape(rows, -1)
    elif grid.zero == "least":
        parts["least"] = (best.least * unit).reshape(rows, -1)
    return parts


def _laid_out_weights(weights: Floats | None, shape: tuple[int, int], size: int) -> Floats | None:
    """Weights by groups, the largest 1; what a last group lacks has none."""
    if weights is None:
        if shape[1] % size == 0:
            return None
        weights = np.ones(shape[1], np.float32)
    largest = weights.max(initial=0)
    scaled = np.asarray(weights, np.float32) / (largest if largest > 0 else np.float32(1))
    return laid_out(np.broadcast_to(scaled, shape), size, edge=False)


def _best(groups: Groups, grid: GroupGrid, unit: Floats, negative: bool, also: StepType | None, *, exact: bool) -> Best:
    """The best steps, and least values or codes for 0, of groups that are multiples of units."""

    def rounded(values: Floats, how: Storing = storable_steps) -> Floats:
        if grid.nested:
            return values
        with np.errstate(over="ignore"):
            return how(values * unit, grid.step, also) / unit

    levels = grid.high - grid.low
    if grid.zero == "least":
        lines = _lines(groups.numbers, grid.bits, levels, exact)
        return fit_lines(groups, lines, levels, rounded, partial(rounded, how=storable))
    if grid.zero == "code":
        return fit_steps(groups, _with_zeros(groups.numbers, grid, exact), grid.low, grid.high, rounded)
    tried = ((step, np.zeros_like(step)) for step in _steps(groups.numbers, grid, negative, exact))
    return fit_steps(groups, tried, grid.low, grid.high, rounded)


def _shares(bits: int) -> Floats:
    return np.linspace(*_SHARES[bits]).astype(np.float32)


def _steps(numbers: Floats, grid: GroupGrid, negative: bool, exact: bool) -> Iterator[Floats]:
    """Steps to try where zero is fixed."""
    least, most = numbers.min(0), numbers.max(0)
    farthest = np.where(most > -least, most, least)
    finest = farthest / np.float32(grid.low) if negative else np.maximum(most / grid.high, least / grid.low)
    if exact:  # the largest step first: a half of it would do as well, but leaves fewer codes
        for code in range(1, -grid.low + 1):
            yield np.abs(farthest) / np.float32(code)
            if negative:
                yield -np.abs(farthest) / np.float32(code)
    # A group of one number throughout has it as its step; nothing that is no better comes before it.
    yield np.where(least == most, np.abs(farthest), finest).astype(np.float32)
    yield np.abs(farthest) / np.float32(grid.high)
    for share_ in _shares(grid.bits):
        yield finest / share_


def _with_zeros(numbers: Floats, grid: GroupGrid, exact: bool) -> Iterator[Pair]:
    """Steps to try, each with the code for 0 that puts the numbers into the middle of the codes."""
    least, most = np.minimum(numbers.min(0), 0), np.maximum(numbers.max(0), 0)
    extent, middle = most - least, (most + least) / 2
    same = numbers.min(0) == numbers.max(0)
    levels = np.float32(grid.high - grid.low)

    def pair(step: Floats, shift: int = 0) -> Pair:
        with np.errstate(all="ignore"):
            zero = np.rint(np.where(step > 0, -middle / step, 0) - np.float32(0.5)) + np.float32(shift)
        return step, np.clip(np.nan_to_num(zero), grid.low, grid.high).astype(np.float32)

    if exact:
        for code in range(1, grid.high - grid.low + 1):
            yield pair(extent / np.float32(code))
    yield pair(extent / levels)
    yield pair(np.where(same, extent, extent / levels).astype(np.float32))
    for share_ in _shares(grid.bits):
        for shift in (0, 1):
            yield pair(extent / levels / share_, shift)


def _lines(numbers: Floats, bits: int, levels: int, exact: bool) -> Iterator[Pair]:
    """Steps and least values to try, which put the numbers into the middle of the codes."""
    least, most = numbers.min(0), numbers.max(0)
    finest, middle = (most - least) / np.float32(levels), (most + least) / 2
    if exact:
        for code in range(1, levels):
            yield (most - least) / np.float32(code), least
    yield finest, least
    for share_ in _shares(bits):
        step = finest / share_
        yield step, middle - step * np.float32(levels / 2)


def _is_on_grid(matrix: Array, grid: GroupGrid, negative: bool, also: StepType | None) -> bool:
    """Whether most of some groups are on such a grid, and not one of much finer steps."""
    size = grid.group or matrix.shape[1]
    rows = as_floats(matrix[:: -(-matrix.shape[0] // _SAMPLE)]).astype(np.float32)
    groups = laid_out(rows, size)
    groups = np.ascontiguousarray(groups[:, :: -(-groups.shape[1] // _SAMPLE)])
    unit = units(groups)
    sample = Groups(groups / unit, None)
    return bool((_best(sample, grid, unit, negative, also, exact=True).error <= EXACT * size).mean() > 1 / 2)
