"""An artifact listed like a file of another kind, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from pared import readers
from pared.artifact.decoding import decode
from pared.artifact.envelope import Records, artifact_in, records_of
from pared.artifact.index import Entry
from pared.artifact.parse import parse_index
from pared.files.disk import open_file
from pared.formats.dtypes import bytes_of
from pared.readers.listing import ListedTensor, Listing, Storage


@contextmanager
def open_either(path: Path) -> Iterator[Records | Listing]:
    """Open a file or folder that may be an artifact, or hold one: its records, or else what `open_listing` gives.

    Raises:
        FileError, CorruptError, UnsafeError: as `open_records` and `open_listing`.
    """
    readers.refuse_cut(path)
    artifact = artifact_in(path)
    with ExitStack() as files:
        file = None if artifact.is_dir() else files.enter_context(open_file(artifact))
        records = None if file is None else records_of(file)
        yield records or files.enter_context(readers.open_listing(path))


def list_artifact(records: Records) -> Listing:
    """List the tensors of an artifact, each by all of its names; they are decoded when they are read.

    Raises:
        CorruptError, UnsafeError, VersionError: as `parse_index`.
    """
    entries = parse_index(records).entries
    return Listing(
        tuple(
            ListedTensor(name, entry.dtype, entry.shape, entry.nbytes, entry.name, format=entry.label)
            for entry in entries
            for name in entry.names
        ),
        {entry.name: Storage(entry.nbytes, partial(_content, entry, records.data), coded=True) for entry in entries},
        where=records.where,
        nbytes=records.nbytes,
        kind="an artifact",
    )


def _content(entry: Entry, data: memoryview) -> memoryview:
    return bytes_of(decode(entry, data))
