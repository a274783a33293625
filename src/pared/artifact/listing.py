"""An artifact listed like a file of another kind, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from pared import readers
from pared.artifact.decoding.pieces import need, pieces
from pared.artifact.decoding.whole import decode
from pared.artifact.envelope import Records, artifact_in, open_records, records_of
from pared.artifact.index import Entry
from pared.artifact.parse import parse_index
from pared.artifact.shards import check_there, sharded_in
from pared.files.disk import open_file
from pared.files.memory_limit import MemoryLimit
from pared.formats.dtypes import bytes_of
from pared.readers.folders.manifests import manifest_parts
from pared.readers.listing import ListedTensor, Listing, Storage


@contextmanager
def open_either(path: Path) -> Iterator[Records | Listing]:
    """Open a file or folder that may be an artifact, or hold one: its records, or else what `open_listing` gives.

    Raises:
        FileError, CorruptError, UnsafeError: as `open_records` and `open_listing`.
    """
    readers.refuse_cut(path)
    artifact = artifact_in(path)
    parts = artifact_parts(path)
    index = sharded_in(path)
    with ExitStack() as files:
        if parts:
            held = [(f"{part}/" if part else "", artifact_in(path / part)) for part in parts]
            yield _joined(path, [(prefix, files.enter_context(open_records(one))) for prefix, one in held], "artifacts")
            return
        if index is not None:
            yield _joined(path, [("", files.enter_context(open_records(one))) for one in check_there(index)], "shards")
            return
        file = None if artifact.is_dir() else files.enter_context(open_file(artifact))
        records = None if file is None else records_of(file)
        yield records or files.enter_context(readers.open_listing(path))


def artifact_parts(path: Path) -> tuple[str, ...]:
    """The folders in which the artifacts of a folder of several models are, as its manifest names them; () otherwise.

    Raises:
        CorruptError: the manifest is not JSON.
    """
    parts = [part for part in manifest_parts(path) if artifact_in(path / part).is_file()] if path.is_dir() else []
    return tuple(parts) if any(parts) else ()


def _joined(path: Path, parts: Sequence[tuple[str, Records]], what: str) -> Listing:
    """The tensors of several artifacts, each with what precedes its names."""
    tensors: list[ListedTensor] = []
    storages: dict[str, Storage] = {}
    for prefix, records in parts:
        listing = list_artifact(records)
        storages |= {prefix + key: storage for key, storage in listing.storages.items()}
        tensors += [
            replace(held, name=prefix + held.name, storage=f"{prefix}{held.storage}") for held in listing.tensors
        ]
    nbytes = sum(records.nbytes for _, records in parts)
    return Listing(tuple(tensors), storages, where=str(path), nbytes=nbytes, kind=f"{len(parts)} {what}")


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
        {entry.name: _storage(entry, records) for entry in entries},
        where=records.where,
        nbytes=records.nbytes,
        kind="an artifact",
    )


def _storage(entry: Entry, records: Records) -> Storage:
    limit = MemoryLimit(records.where, records.nbytes)
    return Storage(
        entry.nbytes,
        partial(_content, entry, records.data),
        coded=True,
        need=need(entry),
        pieces=partial(pieces, entry, records.data, limit),
    )


def _content(entry: Entry, data: memoryview) -> memoryview:
    return bytes_of(decode(entry, data))
