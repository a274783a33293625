"""Packed tensors as entries of an artifact's index."""

from __future__ import annotations

import zlib

from pared.compression.packing import Packed
from pared.container import Entry, Part, start_of
from pared.selection import Kept


def entry_of(kept: Kept, packed: Packed, end: int, factor: float = 1.0) -> Entry:
    """The entry of a tensor, whose parts stand behind `end` in the data.

    Args:
        kept: its names and source.
        packed: its parts.
        end: of the part before.
        factor: by which its parts are longer than these.
    """
    parts, crc32 = {}, 0
    for i, (name, part) in enumerate(packed.parts.items()):
        nbytes = round(len(part.payload) * factor)
        start = start_of(end, nbytes)
        crc32 = zlib.crc32(part.payload, crc32)
        checksum = crc32 if i == len(packed.parts) - 1 else None
        parts[name] = Part(start, nbytes, checksum, part.coding, part.rows, part.base)
        end = start + nbytes
    return Entry(
        names=kept.names,
        kind=kept.kind,
        dtype=kept.held.dtype,
        shape=kept.held.shape,
        format=packed.format,
        view=(packed.view.split, packed.view.rows) if packed.view is not None else None,
        bits=packed.bits,
        because=packed.because,
        parts=parts,
    )
