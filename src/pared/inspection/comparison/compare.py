"""`compare`: two models, in memory or in files, tensor by tensor; with data also layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pared.errors import ConfigError, MismatchError
from pared.files.memory_limit import MemoryLimit
from pared.files.threads import each
from pared.formats.dtypes import Array, is_floating
from pared.inspection.comparison.metrics import Similarity, identical, measure
from pared.inspection.comparison.pairing import Layout, Match, correlation, layout_of, pair, sampled
from pared.inspection.comparison.result import Alone, Comparison, Pair, Side
from pared.inspection.comparison.sources import ReadableTensor, open_source, readable
from pared.readers.listing import Listing
from pared.readers.memory import is_model

if TYPE_CHECKING:  # files are compared without torch
    from pared.model.calls import Calibration

# The number of pairs of tensors that are decoded at a time.
_AT_ONCE = 2
# With a lower correlation, square matrices are compared transposed too.
_UNLIKE = 0.5


def compare(a: object, b: object, inputs: Calibration | None = None) -> Comparison:
    """Show how two models differ: in their tensors, and with data in the outputs of their modules.

    Tensors are matched by name, then by name without what wrappers add ("module.", "state_dict/", another common
    prefix), then by content: the same shape, or the transposed one, and correlated numbers. Each pair is compared in
    blocks, with sums in float64; no more than two pairs are decoded at a time. Nothing in a file is executed, and
    without `inputs` neither model is run or changed.

    Args:
        a: the reference: the path of a file, a folder or an artifact; a model, float or quantized; or a state dict.
        b: the model to compare with it, in any of the same forms.
        inputs: batches as `pared.fit` takes them for calibration (an iterable of tensors, tuples of arguments or
            dicts of keyword arguments), or a callable that is given `a` and calls it; `b` is called with the same
            arguments. Both must be models. They run in eval mode, without gradients; training flags, hooks and random
            states are restored afterwards.

    Returns:
        a `Comparison`, which prints as text and has `to_json()`.

    Raises:
        ConfigError: one of the two has no tensors by its type; or there are inputs, and one of the two is not a model.
        FileError: a file cannot be read.
        CorruptError, UnsafeError, VersionError: see `inspect`.
        MismatchError: they have no tensor in common.
        CalibrationError: the inputs are empty, ambiguous or do not fit `a`.
        ModelError: `b` cannot be called as `a` is.

    >>> import torch
    >>> a, b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    >>> compare(a, a).weights.same, compare(a, b).weights.same
    (True, False)
    >>> compare(a, b, inputs=[torch.ones(1, 4)]).diverges_at
    ''
    """
    if inputs is not None and not (is_model(a) and is_model(b)):
        raise ConfigError(
            "inputs are given, but one of the two is not a torch.nn.Module",
            where="compare",
            remedy="Pass two models, or leave out the inputs: files have no layers to call.",
        )
    with open_source(a, "compare: A") as source_a, open_source(b, "compare: B") as source_b:
        comparison = _tensors(source_a, source_b)
    if inputs is None:
        return comparison
    from pared.inspection.comparison.divergence import follow  # files are compared without torch

    outputs, layers, diverges_at = follow(cast("Any", a), cast("Any", b), inputs)
    return replace(comparison, outputs=outputs, layers=layers, diverges_at=diverges_at)


def _tensors(a: Listing, b: Listing) -> Comparison:
    # Two pairs are read at a time, and what has been read is compared in blocks.
    most = MemoryLimit(f"{a.where} and {b.where}", a.nbytes + b.nbytes).left // (2 * _AT_ONCE)
    first, second = readable(a, most), readable(b, most)
    matches = pair(first, second)
    if not matches:
        raise MismatchError(
            f"have no tensor in common: A {_names(first)}; B {_names(second)}",
            where=f"{a.where} and {b.where}",
            remedy="Compare two states of one architecture; pared inspect shows what is in a file.",
        )
    sizes = [max(match.a.nbytes, match.b.nbytes) for match in matches]
    pairs = sorted(each(_compared, matches, sizes, most=_AT_ONCE), key=_badness)
    alone = (*_alone(first, "A", [match.a for match in matches]), *_alone(second, "B", [match.b for match in matches]))
    sides = Side(a.where, a.nbytes, len(first)), Side(b.where, b.nbytes, len(second))
    return Comparison(*sides, tuple(pairs), alone)


def _names(tensors: Sequence[ReadableTensor]) -> str:
    names = [tensor.name for tensor in tensors]
    if not names:
        return "has none"
    more = f" and {len(names) - 2:,} more" if names[2:] else ""
    return f"has {', '.join(f'{name[:60]!r}' for name in names[:2])}{more}"


def _badness(pair: Pair) -> float:
    if pair.similarity is None:
        return -math.inf
    return pair.similarity.sqnr if not math.isnan(pair.similarity.sqnr) else -math.inf


def _alone(tensors: Sequence[ReadableTensor], side: str, matched: Sequence[ReadableTensor]) -> list[Alone]:
    taken = {id(tensor) for tensor in matched}
    places = {tensor.place: tensor.name for tensor in reversed(matched) if tensor.place is not None}
    rows = []
    for tensor in tensors:
        if id(tensor) not in taken:
            tied = places.get(tensor.place)
            note = tensor.note or (f"shares the numbers of {tied}, which both have" if tied is not None else "")
            rows.append(Alone(tensor.name, side, tensor.shape, tensor.label, tensor.nbytes, note))
    return rows


def _compared(match: Match) -> Pair:
    a, b = match.a, match.b

    def row(note: str, **result: Any) -> Pair:
        notes = dict.fromkeys(filter(None, (a.note, b.note, note)))
        return Pair(
            names=(a.name, b.name),
            shapes=(a.shape, b.shape),
            formats=(a.label, b.label),
            nbytes=(a.nbytes, b.nbytes),
            by=match.by,
            note="; ".join(notes),
            **result,
        )

    if (a.pieces or b.pieces) and a.shape == b.shape and not (a.note or b.note):
        similarity, same_bits = _in_pieces(a, b)
        return row("", similarity=similarity, identical=same_bits and a.dtype == b.dtype)
    arrays = _read(a, b)
    if arrays[0] is None or arrays[1] is None:
        return row("" if a.note or b.note else "its numbers cannot be read", similarity=None)
    if (a.note or b.note) and a.dtype != b.dtype:
        return row("codes cannot be compared with values", similarity=None)
    x, y, layout = _aligned(arrays[0], arrays[1], match)
    if x.shape != y.shape:
        return row("", similarity=None)
    similarity = measure(x, y)
    same_bits = a.dtype == b.dtype and not layout and similarity.same and identical(x, y)
    return row(f"{layout} in B" if layout else "", similarity=similarity, identical=same_bits)


def _in_pieces(a: ReadableTensor, b: ReadableTensor) -> tuple[Similarity | None, bool]:
    """How alike two tensors of one shape are, of which at least one is too large to be read at once."""
    streams = _flat(a), _flat(b)
    found, same = Similarity(), True
    x = y = np.empty(0)
    while True:
        x, y = (one if one.size else next(stream, one) for one, stream in zip((x, y), streams, strict=True))
        count = min(x.size, y.size)
        if not count:
            break
        found += measure(x[:count], y[:count])
        same = same and x.dtype == y.dtype and identical(x[:count], y[:count])
        x, y = x[count:], y[count:]
    return (found if found.count == math.prod(a.shape) else None), same


def _flat(tensor: ReadableTensor) -> Iterator[Array]:
    """The numbers of a tensor in C order, in pieces."""
    if tensor.pieces is not None:
        yield from tensor.pieces()
        return
    array = tensor.read()
    if array is not None:
        whole = array.flags.c_contiguous or array.ndim == 1
        for part in [array] if whole else array:  # of one that is strided, a row at a time is copied
            yield np.ascontiguousarray(part).reshape(-1)


def _read(a: ReadableTensor, b: ReadableTensor) -> tuple[Array | None, Array | None]:
    """The numbers of both; if codes may have steps by row or by column, the reading closer to the other side."""
    x, y = a.read(), b.read()
    if x is not None and y is not None and x.shape == y.shape:
        if a.by_columns is not None and b.by_columns is None:
            x = _nearer(y, x, a.by_columns())
        elif b.by_columns is not None and a.by_columns is None:
            y = _nearer(x, y, b.by_columns())
    return x, y


def _nearer(reference: Array, by_rows: Array, by_columns: Array | None) -> Array:
    """The reading of the codes that correlates better with a reference."""
    if by_columns is None:
        return by_rows
    wanted = sampled(reference)
    return max((by_rows, by_columns), key=lambda reading: correlation(wanted, sampled(reading)))


def _aligned(a: Array, b: Array, match: Match) -> tuple[Array, Array, Layout]:
    """Both arrays in the shape of the first, if the second can be brought to it."""
    layout: Layout | None = match.layout
    square = a.shape == b.shape and a.ndim == 2 and a.shape[0] == a.shape[1] > 1
    if not layout and (a.shape != b.shape or (square and _unlike(a, b))):
        layout = layout_of(a, b)
    if layout == "transposed":
        return a, b.T, layout
    return (a, b.reshape(a.shape), layout) if layout == "reshaped" and a.shape != b.shape else (a, b, "")


def _unlike(a: Array, b: Array) -> bool:
    return is_floating(a) and correlation(sampled(a), sampled(b)) < _UNLIKE
