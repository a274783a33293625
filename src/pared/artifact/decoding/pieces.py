"""Decode a tensor of an artifact piece by piece: a file of a few bytes may describe very many numbers.

Codes that are all equal take no bytes, and others a quarter of a bit or more. So the memory that a whole tensor takes
is not bounded by the size of the file; where it is too much, the tensor is read in pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pared.artifact.index import Entry
from pared.artifact.parts import parts_of
from pared.errors import DANGEROUS, CorruptError, UnsafeError
from pared.files.memory_limit import MemoryLimit
from pared.formats import entropy
from pared.formats.dtypes import ELEMENTS, ITEM_SIZES, Array, converted
from pared.formats.entropy import Codes
from pared.formats.groups import stored
from pared.formats.streams import EncodedPart, chunks_of, decode_codes, decode_scales, decode_steps
from pared.formats.views import View, first_dimension

PIECE: Final = 1 << 18  # numbers
_STEP_NBYTES: Final = 40  # what decoding a step takes for a while


def need(entry: Entry) -> int:
    """The bytes that decoding a whole tensor takes: about those of its codes, of their products, and of its values."""
    value = ITEM_SIZES[entry.dtype]
    if entry.groups is not None:  # and of the step, the least value and the product of each code
        return entry.elements * (2 + 4 * 4 + value) + _beside(entry) * _STEP_NBYTES
    if entry.format["tag"] != "grid":
        return 0 if entry.label == entry.dtype else entry.elements * value
    return entry.elements * (2 * ITEM_SIZES[entry.format["codes"]] + 4 + value) + _beside(entry) * _STEP_NBYTES


def _beside(entry: Entry) -> int:
    """The numbers of a grid that are not codes."""
    if entry.groups is None:
        return entry.n_rows + entry.scaled * entry.n_columns
    return sum(math.prod(shape) for name, shape in entry.shapes.items() if name != "codes")


def pieces(entry: Entry, data: memoryview, limit: MemoryLimit) -> Iterator[Array]:
    """The numbers of a tensor in C order, in pieces of one dimension: the same as those of `decode`.

    Args:
        entry: the tensor's entry in an index that `parse_index` has checked.
        data: the artifact's second record.
        limit: what may be taken beyond a few pieces.

    Raises:
        CorruptError: the bytes contradict the index or their checksum.
        UnsafeError: its steps, or codes whose rows lie across each other, are too many for the limit.
    """
    parts = parts_of(entry, data)
    kind = ELEMENTS[entry.dtype]
    try:
        if entry.view is not None:
            yield from (converted(values, kind) for values in _grid(entry, parts, limit))
            return
        flat = np.frombuffer(parts["values"].payload, ELEMENTS[entry.format.get("dtype", entry.dtype)])
        for start in range(0, len(flat), PIECE):
            yield converted(flat[start : start + PIECE], kind)
    except CorruptError as error:
        raise CorruptError(error.what, where=entry.name, remedy=error.remedy) from error


def _grid(entry: Entry, parts: Mapping[str, EncodedPart], limit: MemoryLimit) -> Iterator[NDArray[np.float32]]:
    view = View(*entry.view) if entry.view else first_dimension(entry.shape)
    kind = np.dtype(entry.format.get("codes", "int8"))
    lines = view.across if entry.scaled else view  # what classes are of
    by_rows = lines.rows == tuple(range(len(lines.rows)))
    taken = _beside(entry) * _STEP_NBYTES
    if "classes" in parts and not by_rows:
        taken += entry.elements * 2 * kind.itemsize
    if not limit.affords(taken):
        raise UnsafeError(
            f"its {entry.elements:,} numbers cannot be decoded in memory of four times the file and 64 MiB",
            where=entry.name,
            remedy=DANGEROUS,
        )
    values_of = _valued(entry, parts, view)
    if "codes" in parts:
        found = _codes(parts["codes"], entry.elements, kind)
    elif by_rows:
        found = _by_classes(parts, lines, kind)
    else:
        found = iter([decode_codes(parts, entry.shape, lines, kind).reshape(-1)])
    start = 0
    for run in found:
        for first in range(0, len(run), PIECE):
            codes = run[first : first + PIECE]
            yield values_of(codes, start)
            start += len(codes)


def _valued(entry: Entry, parts: Mapping[str, EncodedPart], view: View) -> Callable[[Codes, int], NDArray[np.float32]]:
    """A function that decodes neighbouring codes, from the place of the first."""
    if entry.groups is None:
        step = decode_steps(parts["step"], view.n_rows)
        scale = decode_scales(parts["scale"], view.n_columns) if entry.scaled else None

        def product(codes: Codes, start: int) -> NDArray[np.float32]:
            values = codes.astype(np.float32)
            values *= step[_places(view, view.rows, start, len(codes))] if view.rows else step
            if scale is not None:
                values *= scale[_places(view, view.columns, start, len(codes))]
            return values

        return product

    grid, numbers = entry.groups, stored.beside_codes(entry.groups, parts, view)
    steps, origins = grid.steps(numbers), grid.origins(numbers)
    size = min(grid.group or view.n_columns, view.n_columns)

    def decoded(codes: Codes, start: int) -> NDArray[np.float32]:
        stored.check_codes(codes, grid)
        row = _places(view, view.rows, start, len(codes))
        group = _places(view, view.columns, start, len(codes)) // size
        return grid.values(codes, steps[row, group], None if origins is None else origins[row, group])

    return decoded


def _codes(part: EncodedPart, count: int, kind: np.dtype[np.signedinteger]) -> Iterator[Codes]:
    """The codes of one stream; each chunk of it is a stream of its own."""
    coding, data = part.coding, memoryview(part.payload)
    if coding is None or coding.constant is not None:
        size = 0 if coding is not None else kind.itemsize
        for start in range(0, count, PIECE):
            n = min(PIECE, count - start)
            end = (start + n) * size if start + n < count else len(data)
            yield entropy.decode(data[start * size : end], coding, n, kind, threads=1)
        return
    for size, chunk in chunks_of(part, count):
        yield entropy.decode(chunk, coding, size, kind, threads=1)


def _by_classes(parts: Mapping[str, EncodedPart], view: View, kind: np.dtype[np.signedinteger]) -> Iterator[Codes]:
    """The codes of all rows, which stand by class."""
    classes = np.concatenate([*_codes(parts["classes"], view.n_rows, np.dtype(np.int8))])
    sizes = [part.rows for part in parts.values() if part.rows is not None]
    if np.bincount(classes.view(np.uint8), minlength=len(sizes)).tolist() != sizes:
        raise CorruptError("the classes of its rows differ in size from what its index says")
    columns = view.n_columns
    streams = [_Taken(_codes(parts[f"codes {k}"], rows * columns, kind), kind) for k, rows in enumerate(sizes)]
    rows = max(1, PIECE // max(columns, 1))
    for start in range(0, view.n_rows, rows):
        chosen = classes[start : start + rows]
        if rows == 1:  # long rows, each in pieces
            for column in range(0, columns, PIECE):
                yield streams[chosen[0]].take(min(PIECE, columns - column))
            continue
        block = np.empty((len(chosen), columns), kind)
        for number, stream in enumerate(streams):
            mine = chosen == number
            count = int(mine.sum())
            block[mine] = stream.take(count * columns).reshape(count, columns)
        yield block.reshape(-1)


class _Taken:
    """Codes that are taken from an iterator of pieces, as many as are asked for."""

    def __init__(self, found: Iterator[Codes], kind: np.dtype[np.signedinteger]) -> None:
        self._found, self._left = found, np.empty(0, kind)

    def take(self, count: int) -> Codes:
        """The next codes."""
        got = [self._left]
        while sum(map(len, got)) < count:
            got.append(next(self._found))
        whole = np.concatenate(got) if got[1:] else got[0]
        self._left = whole[count:]
        return whole[:count]


def _places(view: View, dimensions: tuple[int, ...], start: int, count: int) -> NDArray[np.int64]:
    """The row of each of some neighbouring numbers, or its column: its place along some dimensions of a view."""
    places = np.arange(start, start + count)
    found = np.zeros(count, np.int64)
    inner = math.prod(view.split[i] for i in dimensions)
    for dimension, (size, distance) in enumerate(zip(view.split, _distances(view.split), strict=True)):
        if dimension in dimensions:
            inner //= size
            found += places // distance % size * inner
    return found


def _distances(split: tuple[int, ...]) -> list[int]:
    """How far apart neighbours along each dimension are, in C order."""
    found = [1]
    for size in reversed(split[1:]):
        found.append(found[-1] * size)
    return found[::-1][: len(split)]
