"""`.keras` files: a zip archive with the weights as HDF5, and the model's configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from pared.errors import CorruptError
from pared.files.checks import DAMAGED
from pared.files.disk import File
from pared.files.zip_file import Archive
from pared.readers.hdf5.datasets import read_hdf5
from pared.readers.listing import Listing, Note

_WEIGHTS: Final = "model.weights.h5"


def is_keras(archive: Archive) -> bool:
    """Whether an archive is one of Keras."""
    return any(member.name == _WEIGHTS for member in archive.members)


def read_keras(file: File, archive: Archive) -> Listing:
    """The weights in a `.keras` file; its other members are notes.

    Raises:
        CorruptError: it contradicts itself, or its weights are compressed, which Keras never does.
    """
    (weights,) = (member for member in archive.members if member.name == _WEIGHTS)
    if not weights.plain:
        raise CorruptError(f"its member {_WEIGHTS!r} is compressed", where=file.where, remedy=DAMAGED)
    inside = File(f"{file.where}: {_WEIGHTS}", file.data[weights.offset : weights.end], file.stream)
    others = {f"({member.name})": Note(member.stored) for member in archive.members if member is not weights}
    listing = read_hdf5(inside)
    return replace(listing, notes=others | dict(listing.notes), kind="a .keras file")
