"""The two records of an artifact in a torch zip or a .safetensors file; the content decides which, not the name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pared.errors import CorruptError, FileError
from pared.files.disk import File, open_file, reading
from pared.files.magic import kind_of
from pared.files.safetensors_file import is_safetensors, read_header
from pared.files.zip_file import PICKLE, Archive, Member, checked_content, is_zip, read_archive, torch_folder

FILE_NAMES: Final[Mapping[str, str]] = {"pt": "best_model.pt", "safetensors": "best_model.safetensors"}
INDEX_FILE: Final = f"{FILE_NAMES['safetensors']}.index.json"  # of an artifact in shards

# The members of a torch zip that holds an artifact, all in one folder; which optional ones depends on torch's version.
_INDEX, _DATA = "data/0", "data/1"
_REQUIRED: Final = (PICKLE, _INDEX, _DATA, "version")
_OPTIONAL: Final = ("byteorder", ".data/serialization_id", ".format_version", ".storage_alignment")

# How torch pickles the keys "index" and "data": by them a torch zip is known as an artifact.
_MARKS: Final = (b"X\x05\x00\x00\x00index", b"X\x04\x00\x00\x00data")
_LARGEST_NOTE: Final = 4096  # bytes; the size of each member except the records

# After each member torch writes a descriptor of 16 bytes, or of 24 where sizes need 64 bits.
_DESCRIPTORS: Final = (0, 16, 24)


@dataclass(frozen=True, eq=False)
class Records:
    """The two records of an artifact.

    Args:
        where: the file's name, for messages.
        nbytes: the size of the whole file.
        index: the first record.
        data: the second, mapped into memory rather than read; valid while the file is open.
    """

    where: str
    nbytes: int
    index: bytes
    data: memoryview


def artifact_in(path: Path) -> Path:
    """The artifact in a directory; the path itself if there is none, or if it is not a directory.

    >>> artifact_in(Path("model.pt")).name
    'model.pt'
    """
    return next((path / name for name in FILE_NAMES.values() if os.path.isfile(path / name)), path)  # noqa: PTH113  # never raises


def find_artifact(path: Path) -> Path:
    """The artifact in a directory, or the file itself.

    Raises:
        FileError: there is none.
    """
    found = artifact_in(path)
    with reading(path):
        if found.is_file():
            return found
        if found.is_dir():
            next(found.iterdir(), None)  # raises if one may not look into it
            if (found / INDEX_FILE).is_file():
                raise FileError(
                    "its artifact is in shards, which are read to load, inspect and compare a model, and not for this",
                    where=str(path),
                    remedy='Load it, and write it whole: model.save_pretrained(directory, max_shard_size="100GB").',
                )
    raise FileError(
        "there is no artifact here",
        where=str(path),
        remedy=f"Pass the directory that save or compress wrote, or the file ({' or '.join(FILE_NAMES.values())}).",
    )


@contextmanager
def open_records(source: bytes | str | os.PathLike[str], where: str = "") -> Iterator[Records]:
    """Open an artifact without reading its data.

    Args:
        source: a path, or a file's bytes.
        where: the name for messages; default: the path.

    Raises:
        FileError: there is no such file, or it is not an artifact.
        CorruptError: its container contradicts itself.
    """
    with open_file(source, where) as file:
        records = records_of(file)
        if records is None:
            raise FileError(
                f"is {kind_of(file)}, not an artifact of pared",
                where=file.where,
                remedy="Pass what save wrote; pared inspect shows what is in other files.",
            )
        yield records


def records_of(file: File) -> Records | None:
    """The records of an artifact; None if the file is something else.

    Raises:
        CorruptError: its container contradicts itself.
    """
    if is_zip(file):
        return _zip_records(file, read_archive(file))
    if is_safetensors(file):
        return _safetensors_records(file)
    return None


def _zip_records(file: File, archive: Archive) -> Records | None:
    folder = torch_folder(file, archive)
    if folder is None:
        return None
    members = {member.name.removeprefix(folder): member for member in archive.members}
    pickle = members[PICKLE]
    content = bytes(file.data[pickle.offset : pickle.end]) if pickle.stored <= _LARGEST_NOTE else b""
    if not all(mark in content for mark in _MARKS):
        return None
    _check_members(file, members)
    _check_gaps(file, archive)
    data = members[_DATA]
    # The data are large, and each tensor in them has its own checksum.
    contents = {name: checked_content(file, member) for name, member in members.items() if name != _DATA}
    return Records(file.where, len(file.data), contents[_INDEX], file.data[data.offset : data.end])


def _check_members(file: File, members: Mapping[str, Member]) -> None:
    """Check that there are exactly the members of an artifact, as torch writes them."""
    if missing := sorted(set(_REQUIRED) - members.keys()):
        raise _corrupt(file, f"its member {missing[0]!r} is missing")
    if unknown := sorted(members.keys() - {*_REQUIRED, *_OPTIONAL}):
        raise _corrupt(file, f"it has a member {unknown[0]!r}, which no artifact has")
    for name, member in members.items():
        if not member.plain:
            raise _corrupt(file, f"its member {name!r} is compressed or encrypted, which torch never does")
        if member.stored > _LARGEST_NOTE and name not in (_INDEX, _DATA):
            raise _corrupt(file, f"its member {name!r} has {member.stored:,} bytes, more than torch writes")


def _check_gaps(file: File, archive: Archive) -> None:
    """Check that the members follow one another, with nothing else in the file."""
    ends = [0, *(member.end for member in archive.members)]
    starts = [*(member.start for member in archive.members), archive.directory]
    first, *gaps = (start - end for end, start in zip(ends, starts, strict=True))
    if first or any(gap not in _DESCRIPTORS for gap in gaps) or archive.comment:
        raise _corrupt(file, "it has bytes that do not belong to any member of its archive")


def _safetensors_records(file: File) -> Records | None:
    header = read_header(file)
    if header.metadata.get("format") != "pared":
        return None
    spans = {span.name: span for span in header.spans}
    for name in ("index", "data"):
        if name not in spans:
            raise _corrupt(file, f"its tensor {name!r} is missing")
    for span in header.spans:
        if span.name not in ("index", "data") or span.dtype != "U8" or len(span.shape) != 1:
            raise _corrupt(file, f"it has a tensor {span.name!r} of {span.dtype}, which no artifact has")
    index, data = spans["index"], spans["data"]
    return Records(
        file.where,
        len(file.data),
        bytes(file.data[index.begin : index.end]),
        file.data[data.begin : data.end],
    )


def _corrupt(file: File, what: str) -> CorruptError:
    return CorruptError(what, where=file.where)
