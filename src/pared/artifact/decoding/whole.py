"""Decode the tensors of an artifact into NumPy arrays, without torch."""

from __future__ import annotations

import numpy as np

from pared.artifact.index import Entry
from pared.artifact.parts import parts_of
from pared.errors import CorruptError
from pared.formats import grids
from pared.formats.dtypes import ELEMENTS, Array, converted
from pared.formats.groups import stored as groups
from pared.formats.groups.grid import Numbers
from pared.formats.streams import decode_grid
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
    parts = numbers_of(entry, data)
    if "codes" not in parts:
        return converted(parts["values"], ELEMENTS[entry.dtype])
    view = view_of(entry)
    if entry.groups is None:
        values = grids.decode(parts["codes"], parts["step"], view, parts.get("scale"))
    else:
        matrix = entry.groups.decode({**parts, "codes": matrix_of(parts["codes"], view)})
        values = restored(matrix, entry.shape, view)
    return converted(values, ELEMENTS[entry.dtype])


def numbers_of(entry: Entry, data: memoryview) -> dict[str, Numbers]:
    """The numbers of a tensor as they are stored.

    Args:
        entry: as for `decode`.
        data: as for `decode`.

    Returns:
        of a grid what `streams.decode_grid` gives; with groups, "codes" and the other parts of `GroupGrid.shapes`; of
        any other tensor "values", of its shape, in the type in which they are stored.

    Raises:
        CorruptError: as `decode`.
    """
    parts = parts_of(entry, data)
    try:
        if entry.format["tag"] == "grid":
            return decode_grid(parts, entry.shape, view_of(entry), entry.format["codes"], scaled=entry.scaled)
        if entry.groups is not None:
            return groups.parts(entry.groups, parts, entry.shape, view_of(entry))
        stored = entry.format.get("dtype", entry.dtype)
        return {"values": np.frombuffer(parts["values"].payload, ELEMENTS[stored]).reshape(entry.shape)}
    except CorruptError as error:
        raise CorruptError(error.what, where=entry.name, remedy=error.remedy) from error


def view_of(entry: Entry) -> View:
    """What the rows of a tensor on a grid are."""
    return View(*entry.view) if entry.view else first_dimension(entry.shape)
