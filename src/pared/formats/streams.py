"""The bytes of a grid, and back: its codes by classes of rows, its steps on a scale of eighths of an octave.

`docs/format.md` is the specification; why it is so: `docs/decisions/005-format-2.md`. Nothing here uses torch, which
would start threads of its own in each thread that writes or reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pickle import PickleBuffer
from typing import Any, Final, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pared.errors import CorruptError, ParedError
from pared.files.threads import each
from pared.formats import entropy
from pared.formats.entropy import Codes
from pared.formats.views import View, matrix_of, restored

_BUFFERS: Final = 5  # the pickle protocol from which on buffers may be handed on

# The indexes of the scale of steps, 2^(k / 8): from the smallest normal float32 to the last octave.
STEP_INDEXES: Final = range(-8 * 126, 8 * 128)

Steps = NDArray[np.float32]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class EncodedPart:
    """The bytes of one part of a tensor, and what has to be known to read them.

    Args:
        payload: the bytes.
        coding: how codes are coded; None for plain little-endian values.
        rows: for the codes of one class of rows, the number of its rows.
        base: for steps stored as differences of step indexes, the index that they are added to.
    """

    payload: bytes | memoryview
    coding: entropy.Coding | None = None
    rows: int | None = None
    base: int | None = None

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        """Pickle it; with a protocol that hands on buffers, the bytes are not copied."""
        payload = PickleBuffer(self.payload) if int(protocol) >= _BUFFERS else bytes(self.payload)
        return _sent, (payload, self.coding, self.rows, self.base)


def _sent(payload: Any, *rest: Any) -> EncodedPart:
    return EncodedPart(payload if isinstance(payload, bytes) else memoryview(payload), *rest)


# --- codes

# The possible numbers of classes of rows.
_CLASSES: Final = (2, 4, 8)
# What a class costs in addition to its codes, in bytes (estimates): its index entry; the tables of its last block.
_INDEX_PRICE: Final = 24
_TABLE_PRICE: Final = 40
# Whether classes pay is decided on this number of codes of a large matrix.
_ENOUGH: Final = 1 << 17
# Rows are sorted by spread and cut into this number of groups, which are then divided among the classes.
_GROUPS: Final = 64


def encode_codes(codes: Codes, view: View, threads: int = 1) -> dict[str, EncodedPart]:
    """Codes as one stream, or as a stream for each class of rows where that is smaller.

    Args:
        codes: int8 or int16, of the tensor's shape.
        view: what its rows are.
        threads: the largest number of threads; 1 where tensors are already divided among threads.

    Returns:
        "codes"; or "classes" with the class of each row, and "codes 0", "codes 1", ... with the rows of each class, one
        after another.

    >>> sorted(encode_codes(np.eye(4, dtype=np.int8), View((4, 4), (0,))))
    ['codes']
    """
    matrix = matrix_of(codes, view)
    if matrix.size <= 2 * _ENOUGH:
        return _smaller(matrix, codes, 1, threads)
    part = matrix[:: -(-matrix.size // _ENOUGH)]
    parts = None
    if "classes" in _smaller(part, part, matrix.size / max(1, part.size), 1):
        parts = _by_classes(matrix, threads)
    return parts or {"codes": _encoded(codes, threads)}


def _smaller(matrix: Codes, codes: Codes, weight: float, threads: int) -> dict[str, EncodedPart]:
    """Codes as one stream or by classes, whichever is smaller for `weight` times as many codes.

    `matrix` holds the same codes by rows.
    """
    whole = {"codes": _encoded(codes, threads)}
    parts = _by_classes(matrix, threads) if whole["codes"].payload else None
    if parts is None:
        return whole
    more = len(parts) - 2  # streams than one
    fixed = _TABLE_PRICE * more
    price = (sum(len(part.payload) for part in parts.values()) - fixed) * weight + fixed + _INDEX_PRICE * (more + 1)
    return parts if price < len(whole["codes"].payload) * weight else whole


def _by_classes(matrix: Codes, threads: int) -> dict[str, EncodedPart] | None:
    """A stream for each class of rows; None if a single class is likely to be smallest."""
    classes = _classify(matrix)
    if classes is None:
        return None
    parts = {"classes": _encoded(classes)}
    for number in range(int(classes.max()) + 1):
        rows = matrix[classes == number]
        parts[f"codes {number}"] = replace(_encoded(rows, threads), rows=len(rows))
    return parts


def decode_codes(
    parts: Mapping[str, EncodedPart], shape: tuple[int, ...], view: View, kind: DTypeLike, threads: int = 1
) -> Codes:
    """The inverse of `encode_codes`.

    Memory is bounded by the shape, which the caller has to check.

    Args:
        parts: the bytes, by part.
        shape: the tensor's.
        view: what its rows are.
        kind: int8 or int16.
        threads: the largest number of threads; 1 where tensors are already divided among threads.

    Raises:
        CorruptError: the bytes do not hold the number of codes, or of rows in each class, that they should.

    >>> codes, view = np.eye(4, dtype=np.int8), View((4, 4), (0,))
    >>> bool((decode_codes(encode_codes(codes, view), (4, 4), view, "int8") == codes).all())
    True
    """
    if "codes" in parts:
        return _decoded(parts["codes"], math.prod(shape), kind, threads).reshape(shape)
    classes = _decoded(parts["classes"], view.n_rows, np.int8)
    sizes = [part.rows for part in parts.values() if part.rows is not None]
    if np.bincount(classes.view(np.uint8), minlength=len(sizes)).tolist() != sizes:
        raise CorruptError("the classes of its rows differ in size from what its index says")
    matrix = np.empty((view.n_rows, view.n_columns), kind)

    def decode(number: int) -> None:
        chosen = _decoded(parts[f"codes {number}"], sizes[number] * view.n_columns, kind)
        matrix[classes == number] = chosen.reshape(sizes[number], view.n_columns)

    each(decode, range(len(sizes)), [rows * view.n_columns for rows in sizes], most=threads)
    return restored(matrix, shape, view)


def chunks_of(part: EncodedPart, count: int) -> list[tuple[int, memoryview]]:
    """The chunks of a coded stream, each with the number of its codes, which can be decoded one by one.

    Args:
        part: a stream whose codes are not all equal.
        count: the number of its codes.

    Raises:
        CorruptError: the bytes are too few for the lengths of the chunks.
    """
    assert part.coding is not None, "plain numbers have no chunks"
    data, span = memoryview(part.payload), part.coding.span
    sizes = [min(span, count - start) for start in range(0, count, span)]
    place = 4 * (len(sizes) - 1)
    if len(data) < place:
        raise CorruptError(f"{len(data)} bytes cannot hold {len(sizes)} chunks")
    lengths = [*np.frombuffer(data[:place], "<u4").tolist(), len(data)]
    chunks = []
    for size, length in zip(sizes, lengths, strict=True):
        chunks.append((size, data[place : place + length]))
        place += length
    return chunks


def _encoded(codes: Codes, threads: int = 1) -> EncodedPart:
    stream = entropy.encode(codes, threads)
    return EncodedPart(stream.payload, stream.coding)


def _decoded(part: EncodedPart, count: int, kind: DTypeLike, threads: int = 1) -> Codes:
    return entropy.decode(part.payload, part.coding, count, kind, threads)


def _classify(matrix: Codes) -> NDArray[np.int8] | None:
    """The class of each row, by ascending spread; None if a single class is likely to be smallest.

    The spread of a row is the mean magnitude of its codes. Classes are runs of groups of the sorted rows, so divided
    that their entropies, by a model, sum to the least (dynamic programming).
    """
    rows, columns = matrix.shape
    if rows < min(_CLASSES):
        return None
    magnitudes = np.abs(matrix).view(f"u{matrix.itemsize}").sum(1, dtype=np.int64)  # of -128 too, as an unsigned number
    order = np.argsort(magnitudes, kind="stable")
    edges = np.arange(min(_GROUPS, rows) + 1) * rows // min(_GROUPS, rows)
    costs = _costs(np.append(0, np.cumsum(magnitudes[order]))[edges], edges, columns)
    best, cuts = costs[0, -1], np.array([], np.int64)
    for count, (cost, division) in _divisions(costs).items():
        cost += 8 * (_INDEX_PRICE + _TABLE_PRICE) * count
        if count in _CLASSES and cost < best:
            best, cuts = cost, edges[division]
    if not cuts.size:
        return None
    classes = np.empty(rows, np.int8)
    classes[order] = np.searchsorted(cuts, np.arange(rows), "right")
    return classes


def _costs(sums: NDArray[np.int64], edges: NDArray[np.int64], columns: int) -> Floats:
    """The cost in bits of a class with the sorted rows from one edge to another: element (from, to).

    Codes are taken to follow a two-sided geometric distribution, which their mean magnitude determines.
    """
    rows = np.maximum(edges - edges[:, None], 0).astype(float)
    some = np.maximum(rows, 1)
    mean = np.maximum(sums - sums[:, None], 0) / (some * max(columns, 1)) + 1e-9
    ratio = mean / (1 + np.sqrt(1 + mean**2))  # of the frequency of a magnitude to that of the one before
    bits = -np.log2((1 - ratio) / (1 + ratio)) - mean * np.log2(ratio)
    costs: Floats = rows * (columns * bits + np.log2(edges[-1] / some))
    return np.where(rows > 0, costs, np.inf)


def _divisions(costs: Floats) -> dict[int, tuple[float, NDArray[np.int64]]]:
    """The cheapest division into each number of classes: its cost, and the edges at which all but the first begin."""
    groups = len(costs) - 1
    ends, found = costs[0], {}
    begins: list[NDArray[np.int64]] = []
    for count in range(2, min(max(_CLASSES), groups) + 1):
        through = ends[:, None] + costs
        begins.append(through.argmin(0))
        ends = through.min(0)
        division = [groups]
        for begin in reversed(begins):
            division.append(int(begin[division[-1]]))
        found[count] = float(ends[-1]), np.array(division[:0:-1])
    return found


def decode_grid(
    parts: Mapping[str, EncodedPart], shape: tuple[int, ...], view: View, kind: DTypeLike, *, scaled: bool
) -> dict[str, NDArray[Any]]:
    """The numbers of a grid from its bytes.

    Args:
        parts: its bytes, by part.
        shape: the tensor's shape.
        view: which dimensions are rows.
        kind: int8 or int16.
        scaled: whether columns have scales; then classes are of columns.

    Returns:
        "codes" of `shape`, "step" of (rows,), and where they are scaled "scale" of (columns,).

    Raises:
        CorruptError: as `decode_codes` and `decode_steps`; or a scale is 0.
    """
    found = {"codes": decode_codes(parts, shape, view.across if scaled else view, kind)}
    found["step"] = decode_steps(parts["step"], view.n_rows)
    if scaled:
        found["scale"] = decode_scales(parts["scale"], view.n_columns)
    return found


# --- steps

STEPS: Final = ("scale", "step")  # the parts that are steps, in the order of the data
# 2^(k / 8) for k from 0 to 7, each the float32 nearest to it: fixed here, so that every platform has the same steps.
_OCTAVE: Final = np.array(
    [
        *(1.0, 1.0905077457427979, 1.1892070770263672, 1.2968395948410034),
        *(1.4142135381698608, 1.5422108173370361, 1.6817928552627563, 1.8340080976486206),
    ],
    np.float32,
)
_LOWEST, _HIGHEST = STEP_INDEXES[0], STEP_INDEXES[-1]
_REACH: Final = 127  # of a difference to the base
_ZERO: Final = -128  # the difference of a step of zero


def ceiling(step: Steps) -> Steps:
    """The smallest step on the scale that is at least each step; see `coded.log_step`."""
    if not ((step >= 0) & (step <= scale(np.array(_HIGHEST)))).all():
        raise ParedError(
            f"a step is negative, NaN or above {float(scale(np.array(_HIGHEST))):.3g}",
            remedy="Give steps that float32 can hold.",
        )
    raised = scale(np.maximum(_indexes(step), _LOWEST))
    return np.where(step > 0, raised, np.float32(0))


def encode_steps(step: Steps) -> EncodedPart:
    """Steps as differences of step indexes if all are on the scale and close enough to each other, else as float32.

    >>> encode_steps(np.array([0.5, 0.5], np.float32))
    EncodedPart(payload=b'', coding=Coding(per_symbol=1, low_bits=0, constant=0), rows=None, base=-8)
    """
    plain = EncodedPart(step.astype("<f4").tobytes())
    some = step[step > 0]
    indexes = np.clip(_indexes(some), _LOWEST, _HIGHEST)
    on_scale = (scale(indexes) == some).all() and not np.signbit(step).any() and np.isfinite(step).all()
    if not step.size or not on_scale or (some.size and np.ptp(indexes) > 2 * _REACH):
        return plain
    # The median makes the differences small; all have to be within reach.
    base = 0
    if some.size:
        middle = int(np.partition(indexes, some.size // 2)[some.size // 2])
        base = min(max(middle, int(indexes.max()) - _REACH), int(indexes.min()) + _REACH)
    differences = np.full(step.shape, _ZERO, np.int8)
    differences[step > 0] = indexes - base
    return replace(_encoded(differences), base=base)


def decode_steps(part: EncodedPart, count: int) -> Steps:
    """The inverse of `encode_steps` for that number of steps.

    Returns:
        float32 of shape (count,).

    Raises:
        CorruptError: the bytes do not hold that number of steps, or one is negative, not finite or beyond the scale.
    """
    if part.base is None:
        if len(part.payload) != 4 * count:
            raise CorruptError(f"a part holds {len(part.payload)} bytes where {count} steps need {4 * count}")
        steps = np.frombuffer(part.payload, "<f4").astype(np.float32)
        if not (np.isfinite(steps) & (steps >= 0)).all():
            raise CorruptError("a step is negative or not finite")
        return steps
    differences = _decoded(part, count, np.int8)
    zero = differences == _ZERO
    indexes = np.where(zero, 0, differences.astype(np.int64) + part.base)
    if ((indexes < _LOWEST) | (indexes > _HIGHEST)).any():
        raise CorruptError("a step is beyond the scale of steps")
    return np.where(zero, np.float32(0), scale(indexes))


def decode_scales(part: EncodedPart, count: int) -> Steps:
    """As `decode_steps`, of scales, none of which may be 0.

    Raises:
        CorruptError: as `decode_steps`; or one is.
    """
    scales = decode_steps(part, count)
    if not scales.all():
        raise CorruptError("the scale of a column is 0")
    return scales


def _indexes(step: Steps) -> NDArray[np.int64]:
    """The index of the smallest step on the scale, continued without bounds, that is at least each positive step."""
    mantissa, exponent = np.frexp(step)
    return np.searchsorted(_OCTAVE, 2 * mantissa) + 8 * (exponent.astype(np.int64) - 1)


def scale(indexes: NDArray[np.int64]) -> Steps:
    """The steps of the scale with these indexes, which are members of `STEP_INDEXES`: 2^(k / 8).

    >>> scale(np.array([0, 8, -8])).tolist()
    [1.0, 2.0, 0.5]
    """
    scaled: NDArray[Any] = np.ldexp(_OCTAVE[indexes % 8], indexes // 8)
    return scaled.astype(np.float32, copy=False)
