"""What a source has to be before work begins: not an artifact, and a model whose tensors can be kept."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pared import readers
from pared.artifact.envelope import FILE_NAMES, artifact_in, records_of
from pared.checkpoints.sampling import unsupported
from pared.checkpoints.selection import Kept, file_of
from pared.errors import ConfigError, FileError, UnsafeError
from pared.files.disk import open_file
from pared.formats.dtypes import ELEMENTS, ITEM_SIZES
from pared.readers.listing import Listing

BATCH: Final = 1 << 28  # bytes of tensors that are worked on together


def check_places(source: Path, output: Path) -> None:
    """Refuse a source that is an artifact already, or that would be overwritten."""
    target = output / FILE_NAMES["pt"]
    real = os.path.realpath(source)  # which never raises
    if source.exists() and real in (os.path.realpath(output), os.path.realpath(target)):
        raise ConfigError("is the source itself", where=str(output), remedy="Choose another directory to write to.")
    readers.refuse_cut(source)
    artifact = artifact_in(source)
    if artifact.is_file():
        with open_file(artifact) as file:
            if records_of(file) is not None:
                raise ConfigError(
                    "is compressed already",
                    where=str(artifact),
                    remedy="Pass the checkpoint that it was made from, or turn it into one with pared expand.",
                )


def check_kept(kept: Sequence[Kept], listing: Listing) -> None:
    """Refuse tensors that an artifact cannot hold, before any work is done."""
    for place, note in listing.stray.items():
        raise FileError(
            f"has {note.nbytes:,} bytes that are {note.because}: another file may have been appended to it",
            where=f"{listing.where}: {place.strip('()')}" if listing.files else listing.where,
            remedy="Save the whole state dict with torch.save or as .safetensors, and compress that; pared inspect "
            "shows what is read of this file.",
        )
    if not any(one.held.nbytes for one in kept):
        raise FileError(
            "holds no weights of a model",
            where=listing.where,
            remedy="Pass the file or folder that has the state dict.",
        )
    if len(files := {name for one in kept if (name := file_of(one.held))}) > 1:
        raise FileError(
            f"holds several models: {', '.join(sorted(files)[:3])}", where=listing.where, remedy="Pass one of them."
        )
    for one in kept:
        storage = listing.storages[one.held.storage or ""]
        if 0 in (one.held.stride or ()) and one.held.nbytes > max(BATCH, storage.nbytes):
            raise UnsafeError(
                f"repeats {storage.nbytes:,} bytes until they are {one.held.nbytes:,}",
                where=one.held.name,
                remedy="If that is meant: save a contiguous copy of the tensor, and compress that.",
            )
        if one.held.dtype not in ITEM_SIZES or one.held.dtype not in ELEMENTS or storage.content is None:
            raise unsupported(one)
    for name, count in Counter(name for one in kept for name in one.names).items():
        if count > 1:
            raise FileError(
                f"has {count} tensors that a model would know by the name {name!r}",
                where=listing.where,
                remedy="Save the state dict of the model alone, and compress that.",
            )
