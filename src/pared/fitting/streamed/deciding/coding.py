"""Tensors as an artifact holds them, each in a file of its own until all are put together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from pared.artifact.decoding.whole import decode
from pared.artifact.envelope import FILE_NAMES, open_records
from pared.artifact.index import Entry, Index
from pared.artifact.parse import parse_entry, parse_index
from pared.files.checks import Place
from pared.files.disk import write_atomic
from pared.files.safetensors_file import nbytes_of_records, write_safetensors
from pared.formats.dtypes import Array
from pared.model import storage
from pared.model.contents import Stored

_CHUNK: Final = 1 << 22


@dataclass(frozen=True)
class CodedFile:
    """A tensor on the disk.

    Args:
        path: the file: a line with its entry in an index, then its data.
    """

    path: Path

    def write(self, stored: Stored) -> None:
        """Encode and write it."""
        entry, data = storage.encoded_alone(stored)
        head = json.dumps(entry.to_json()).encode() + b"\n"
        write_atomic(self.path, lambda file: file.write(head) and file.write(data))

    def entry(self, end: int = 0) -> Entry:
        """Its entry after one that ends at this offset."""
        with self.path.open("rb") as file:
            head = file.readline()
        return parse_entry(json.loads(head), end, Place(str(self.path)))

    def decoded(self) -> Array:
        """Its numbers, as they are loaded from an artifact."""
        with self.path.open("rb") as file:
            file.readline()
            data = file.read()
        return decode(self.entry(), memoryview(data))

    def data(self, end: int) -> Iterator[bytes]:
        """Its data after those of an entry that ends at this offset, with the zeros between its parts."""
        here, there = self.entry(), self.entry(end)
        with self.path.open("rb") as file:
            start = len(file.readline())
            for own, moved in zip(here.parts.values(), there.parts.values(), strict=True):
                yield bytes(moved.offset - end)
                file.seek(start + own.offset)
                yield from _pieces(file, own.length)
                end = moved.end


def _pieces(file: BinaryIO, left: int) -> Iterator[bytes]:
    while left and (piece := file.read(min(_CHUNK, left))):
        left -= len(piece)
        yield piece


@dataclass(frozen=True)
class Assembly:
    """The artifact of tensors that are all on the disk.

    Args:
        files: the file of each tensor, in the model's order.
        provenance: see `Contents`.
        made: see `Index`.
    """

    files: Sequence[CodedFile]
    provenance: Mapping[str, Any]
    made: tuple[Mapping[str, Any], ...] = ()

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        index, end = self._index()
        return nbytes_of_records(len(index), end)

    def write(self, directory: Path) -> Path:
        """Write the artifact as transformers looks for it, whole or not at all; the directory exists."""
        index, end = self._index()
        path = directory / FILE_NAMES["safetensors"]
        write_atomic(path, lambda file: write_safetensors(file, index, self._data(), end))
        with open_records(path) as records:  # as a reader will: checksums protect the numbers
            parse_index(records)
        return path

    def _index(self) -> tuple[bytes, int]:
        entries: list[Entry] = []
        end = 0
        for file in self.files:
            entries.append(file.entry(end))
            end = entries[-1].end
        return Index(tuple(entries), {}, dict(self.provenance), {}, self.made).to_bytes(), end

    def _data(self) -> Iterator[bytes]:
        end = 0
        for file in self.files:
            yield from file.data(end)
            end = file.entry(end).end
