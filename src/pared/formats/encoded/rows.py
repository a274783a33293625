"""Some rows of a table from its bytes: only the chunks are decoded in which they stand."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import DTypeLike, NDArray

from pared.files.threads import each
from pared.formats import entropy
from pared.formats.entropy import Codes
from pared.formats.streams import EncodedPart, chunks_of, decode_codes
from pared.formats.views import View

Rows = NDArray[np.int64]


def decode_rows(
    parts: Mapping[str, EncodedPart], shape: tuple[int, ...], view: View, kind: DTypeLike, rows: Rows, threads: int
) -> Codes:
    """Some slices of a tensor along its first dimension: what `decode_codes` gives, at these places.

    Args:
        parts: the bytes of its codes, by part, as `encode_codes` gives them for the same view.
        shape: the tensor's, of two dimensions or more.
        view: whose rows the classes are of.
        kind: int8 or int16.
        rows: the places along the first dimension, all within it; ascending, and none twice.
        threads: the largest number of threads.

    Returns:
        of shape (len(rows), *shape[1:]).

    Raises:
        CorruptError: as `decode_codes`.
    """
    columns = math.prod(shape[1:])
    if "codes" in parts:
        return _taken(parts["codes"], shape[0], columns, kind, rows, threads).reshape(-1, *shape[1:])
    if view.split != shape or view.rows != (0,):  # classes of columns: each row is in the streams of all of them
        return decode_codes(parts, shape, view, kind, threads)[rows]
    part = parts["classes"]
    classes = entropy.decode(part.payload, part.coding, shape[0], np.int8, threads=1)
    found = np.empty((len(rows), columns), kind)
    for number in np.unique(classes[rows]).tolist():
        of_class, chosen = np.flatnonzero(classes == number), classes[rows] == number
        places = np.searchsorted(of_class, rows[chosen])
        found[chosen] = _taken(parts[f"codes {number}"], len(of_class), columns, kind, places, threads)
    return found.reshape(-1, *shape[1:])


def _taken(part: EncodedPart, count: int, columns: int, kind: DTypeLike, rows: Rows, threads: int) -> Codes:
    """Some of `count` rows that stand one after another in a stream."""
    coding = part.coding
    if coding is None:
        return np.frombuffer(part.payload, np.dtype(kind).newbyteorder("<")).reshape(count, columns)[rows].astype(kind)
    if coding.constant is not None:
        return np.full((len(rows), columns), coding.constant, kind)
    chunks = chunks_of(part, count * columns)
    first, last = rows * columns // coding.span, (rows * columns + columns - 1) // coding.span
    begun = np.zeros(
        len(chunks) + 1, np.int64
    )  # how many rows begin in each chunk, less those that end in the one before
    np.add.at(begun, first, 1)
    np.add.at(begun, last + 1, -1)
    wanted = np.flatnonzero(np.cumsum(begun[:-1]))
    held = each(
        lambda i: entropy.decode(chunks[i][1], coding, chunks[i][0], kind, threads=1), wanted.tolist(), most=threads
    )
    # Chunks that are left out move what follows them forward.
    places = np.searchsorted(wanted, first) * coding.span + (rows * columns - first * coding.span)
    return sliding_window_view(np.concatenate(held), columns)[places] if held else np.empty((0, columns), kind)
