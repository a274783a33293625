"""Packed tensors as entries of an artifact's index."""

from __future__ import annotations

from pared.artifact.index import Entry
from pared.artifact.parts import placed
from pared.checkpoints.packing import Packed
from pared.checkpoints.selection import Kept


def entry_of(kept: Kept, packed: Packed, end: int, factor: float = 1.0) -> Entry:
    """The entry of a tensor, whose parts stand behind `end` in the data.

    Args:
        kept: its names and source.
        packed: its parts.
        end: of the part before.
        factor: by which its parts are longer than these.
    """
    return Entry(
        names=kept.names,
        kind=kept.kind,
        dtype=kept.held.dtype,
        shape=kept.held.shape,
        format=packed.format,
        view=(packed.view.split, packed.view.rows) if packed.view is not None else None,
        bits=packed.bits,
        because=packed.because,
        parts=placed(packed.parts, end, factor),
    )
