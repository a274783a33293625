"""Decode the tensors of an artifact into NumPy arrays, without torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pared.artifact.index import Entry
from pared.artifact.parts import parts_of
from pared.errors import CorruptError
from pared.formats.dtypes import ELEMENTS, Array, converted
from pared.formats.streams import EncodedPart, decode_codes, decode_steps
from pared.formats.views import View


def decode(entry: Entry, data: memoryview) -> Array:
    """Decode a tensor: bit for bit the values that `load` gives the model.

    Args:
        entry: the tensor's entry in an index that `parse_index` has checked.
        data: the artifact's second record.

    Returns:
        an array of the tensor's shape and of its source's type, as `Listing.array` would give it.

    Raises:
        CorruptError: the bytes contradict the index or their checksum.
    """
    parts = parts_of(entry, data)
    try:
        if entry.format["tag"] == "grid":
            return converted(_on_grid(entry, parts), ELEMENTS[entry.dtype])
        stored = entry.format.get("dtype", entry.dtype)
        values = np.frombuffer(parts["values"].payload, ELEMENTS[stored]).reshape(entry.shape)
        return converted(values, ELEMENTS[entry.dtype])
    except CorruptError as error:
        raise CorruptError(error.what, where=entry.name, remedy=error.remedy) from error


def _on_grid(entry: Entry, parts: Mapping[str, EncodedPart]) -> NDArray[np.float32]:
    """`step[row] * code`, in float32."""
    split, rows = entry.view or (entry.shape, (0,))
    view = View(split, rows)
    codes = decode_codes(parts, entry.shape, view, entry.format["codes"])
    step = parts["step"]
    if step.base is not None:
        steps = decode_steps(step, view.n_rows)
    else:
        steps = np.frombuffer(step.payload, "<f4")
        if not (np.isfinite(steps) & (steps >= 0)).all():
            raise CorruptError("a step is negative or not finite")
    spread = steps.reshape([n if i in rows else 1 for i, n in enumerate(split)])
    values: NDArray[np.float32] = codes.reshape(split).astype(np.float32)
    values *= spread
    return values.reshape(entry.shape)
