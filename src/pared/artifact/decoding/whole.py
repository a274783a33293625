"""Decode the tensors of an artifact into NumPy arrays, without torch."""

from __future__ import annotations

import numpy as np

from pared.artifact.index import Entry
from pared.artifact.parts import parts_of
from pared.errors import CorruptError
from pared.formats import grids
from pared.formats.dtypes import ELEMENTS, Array, converted
from pared.formats.groups import stored as groups
from pared.formats.streams import decode_codes, decode_steps
from pared.formats.views import View, first_dimension, matrix_of, restored


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
            view = View(*entry.view) if entry.view else first_dimension(entry.shape)
            codes = decode_codes(parts, entry.shape, view, entry.format["codes"])
            values = grids.decode(codes, decode_steps(parts["step"], view.n_rows), view)
            return converted(values, ELEMENTS[entry.dtype])
        if entry.groups is not None:
            view = View(*entry.view) if entry.view else first_dimension(entry.shape)
            numbers = groups.parts(entry.groups, parts, entry.shape, view)
            matrix = entry.groups.decode({**numbers, "codes": matrix_of(numbers["codes"], view)})
            return converted(restored(matrix, entry.shape, view), ELEMENTS[entry.dtype])
        stored = entry.format.get("dtype", entry.dtype)
        values = np.frombuffer(parts["values"].payload, ELEMENTS[stored]).reshape(entry.shape)
        return converted(values, ELEMENTS[entry.dtype])
    except CorruptError as error:
        raise CorruptError(error.what, where=entry.name, remedy=error.remedy) from error
