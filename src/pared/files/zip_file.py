"""The members of a zip archive, found without reading them; the folder in which torch saves."""

from __future__ import annotations

import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO, Final, cast

from pared.errors import CorruptError, UnsafeError
from pared.files.disk import File

PICKLE: Final = "data.pkl"

_MAGIC: Final = b"PK\x03\x04"
_LOCAL_HEADER: Final = struct.Struct("<4s2xHH16xHH")  # signature, flags, method, length of name, of extra field
_ENCRYPTED: Final = 1
_UTF8: Final = 0x800
_LISTED_NBYTES: Final = 46  # of a member's entry in the directory, beside its name, extra field and comment
_END_NBYTES: Final = 22  # of the end of the directory, beside the comment
_LARGE_END: Final = b"PK\x06\x06"  # two more records of 76 bytes, where offsets need 64 bits
_LARGE_END_NBYTES: Final = 76
_LONGEST_DESCRIPTOR: Final = 24  # after a member: its checksum and sizes
_ENTRY: Final = struct.Struct("<4s24xHHH12x")  # of the directory: signature, lengths of name, extra field and comment
_ENTRY_MAGIC: Final = b"PK\x01\x02"
_ENTRY_NBYTES: Final = 900  # of an entry's objects, beside its texts, while the directory is read ...
_MEMBER_NBYTES: Final = 224  # ... and of the member that is made of it
_PER_TEXT_BYTE: Final = 9  # of texts that are not ASCII, in two copies

# What the standard library raises on damaged directories.
_ZIP_ERRORS: Final = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, struct.error, ValueError, OverflowError,
    IndexError, OSError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a zip archive.

    Args:
        name: its path in the archive.
        start: the offset of its local header in the file.
        offset: the offset of its content in the file.
        stored: the size of its content in the file, in bytes.
        nbytes: the size of its content, decompressed.
        crc32: the checksum of its decompressed content that the archive states; not compared yet.
        plain: whether it is neither compressed nor encrypted.
        deflated: whether it is compressed with deflate, and not encrypted.
    """

    name: str
    start: int
    offset: int
    stored: int
    nbytes: int
    crc32: int
    plain: bool
    deflated: bool = False

    @property
    def end(self) -> int:
        """The offset in the file after its content."""
        return self.offset + self.stored


@dataclass(frozen=True)
class Archive:
    """The directory of a zip archive, compared with the members themselves.

    Args:
        members: in the order of the file; they do not overlap, and have distinct names.
        directory: the offset of the directory, after all members.
        comment: free text at the end of the file.
        end: the offset after the directory and the comment; the file should end there.
    """

    members: tuple[Member, ...]
    directory: int
    comment: bytes
    end: int = 0

    def gaps(self) -> Iterator[tuple[int, int]]:
        """The offsets of bytes before, between and after the members that belong to nothing in the archive."""
        end = 0
        for member in self.members:
            yield end, member.start
            end = member.end + _LONGEST_DESCRIPTOR
        yield end, self.directory


def is_zip(file: File) -> bool:
    """Whether the file begins as a zip archive."""
    return bytes(file.data[: len(_MAGIC)]) == _MAGIC


def read_archive(file: File) -> Archive:
    """Find the members of a zip archive, by its directory and by their own headers.

    Raises:
        CorruptError: the archive contradicts itself.
    """
    stream = _Bounded(file)
    try:
        with zipfile.ZipFile(cast("BinaryIO", stream)) as archive:  # which uses only these methods
            infos, directory, comment = archive.infolist(), archive.start_dir, archive.comment
    except UnsafeError:  # which is also a ValueError
        raise
    except _ZIP_ERRORS as error:
        raise CorruptError(
            f"its zip directory cannot be read ({error}): it is truncated or damaged",
            where=file.where,
        ) from error
    file.memory.take(sum(_MEMBER_NBYTES + sys.getsizeof(info.filename) for info in infos))
    members = sorted((_member(file, info) for info in infos), key=lambda member: member.start)
    bounds = [*(member.start for member in members), directory]
    for member, (_, bound) in zip(members, pairwise(bounds), strict=True):
        if member.end > bound:
            raise _corrupt(file, f"its member {member.name!r} reaches into what follows it")
    if len({member.name for member in members}) != len(members):
        raise _corrupt(file, "two members of its archive have the same name")
    end = _end(file, infos, directory) + len(comment)
    file.memory.give(stream.taken)  # the members have taken the place of what zipfile makes
    return Archive(tuple(members), directory, comment, end)


def _end(file: File, infos: Sequence[zipfile.ZipInfo], directory: int) -> int:
    """The offset after the directory."""
    listed = sum(_LISTED_NBYTES + len(_listed(info)) + len(info.extra) + len(info.comment) for info in infos)
    end = directory + listed
    large = bytes(file.data[end : end + len(_LARGE_END)]) == _LARGE_END
    return end + _END_NBYTES + (_LARGE_END_NBYTES if large else 0)


def _listed(info: zipfile.ZipInfo) -> bytes:
    """A member's name as the directory has it."""
    return info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")


class _Bounded:
    """The file as a stream for `zipfile`, which makes large objects from each byte of the directory it reads."""

    def __init__(self, file: File) -> None:
        self.stream = file.stream
        self.memory = file.memory
        self.seek, self.tell = file.stream.seek, file.stream.tell
        self.taken = 0

    def read(self, length: int = -1) -> bytes:
        here = self.tell()
        whole = self.seek(0, 2)
        self.seek(here)
        wanted = whole - here if length < 0 else min(length, whole - here)
        self._take(2 * wanted)
        piece = self.stream.read(wanted)
        self._take(_cost(piece))
        return piece

    def _take(self, nbytes: int) -> None:
        self.memory.take(nbytes)
        self.taken += nbytes


def _cost(piece: bytes) -> int:
    """What Python's objects take for a piece of the directory."""
    if not piece.startswith(_ENTRY_MAGIC):
        return _PER_TEXT_BYTE * len(piece)
    nbytes = position = 0
    while position + _ENTRY.size <= len(piece):
        magic, *lengths = _ENTRY.unpack_from(piece, position)
        if magic != _ENTRY_MAGIC:
            break
        begin = position + _ENTRY.size
        name = piece[begin : begin + lengths[0]]
        is_plain = name.isascii() and b"\0" not in name
        nbytes += _ENTRY_NBYTES + (1 if is_plain else _PER_TEXT_BYTE) * len(name) + lengths[1] + lengths[2]
        position = begin + sum(lengths)
    return nbytes


def _member(file: File, info: zipfile.ZipInfo) -> Member:
    start, whole = info.header_offset, len(file.data)
    if not 0 <= start <= whole - _LOCAL_HEADER.size:
        raise _corrupt(file, f"its member {info.filename!r} begins outside the file")
    magic, flags, method, name_length, extra_length = _LOCAL_HEADER.unpack_from(file.data, start)
    name_start = start + _LOCAL_HEADER.size
    name = bytes(file.data[name_start : name_start + name_length])
    if (magic, method, name) != (_MAGIC, info.compress_type, _listed(info)):
        raise _corrupt(file, f"its member {info.filename!r} and the archive's directory contradict each other")
    encrypted = bool((flags | info.flag_bits) & _ENCRYPTED)
    stored_plain = method == zipfile.ZIP_STORED
    if stored_plain and info.compress_size != info.file_size:
        raise _corrupt(file, f"its member {info.filename!r} has two sizes")
    return Member(
        name=info.filename,
        start=start,
        offset=name_start + name_length + extra_length,
        stored=info.compress_size,
        nbytes=info.file_size,
        crc32=info.CRC,
        plain=stored_plain and not encrypted,
        deflated=method == zipfile.ZIP_DEFLATED and not encrypted,
    )


def checked_content(file: File, member: Member) -> bytes:
    """Read a plain member, and compare its checksum.

    Raises:
        CorruptError: they do not match, or it is not plain.
    """
    if not member.plain:
        raise _corrupt(file, f"its member {member.name!r} is compressed or encrypted, which torch never does")
    content = bytes(file.data[member.offset : member.end])
    if zlib.crc32(content) != member.crc32:
        raise _corrupt(file, f"the checksum of its member {member.name!r} does not match")
    return content


def inflated(file: File, member: Member, most: int | None = None) -> bytes:
    """Read a member that is plain or deflated.

    Args:
        file: the archive.
        member: one of its members.
        most: the number of bytes to read from the beginning, unchecked; None: all, compared with its size and checksum.

    Raises:
        CorruptError: it is damaged, or neither plain nor deflated.
    """
    if member.plain:
        return checked_content(file, member) if most is None else bytes(file.data[member.offset : member.end][:most])
    if not member.deflated:
        raise _corrupt(file, f"its member {member.name!r} is encrypted, or compressed by an unusual method")
    stored = file.data[member.offset : member.end]
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        if most is not None:
            return inflate.decompress(stored[: 2 * most], most)
        content = inflate.decompress(stored, member.nbytes + 1)
    except zlib.error as error:
        raise _corrupt(file, f"its member {member.name!r} cannot be inflated ({error})") from error
    if len(content) != member.nbytes or zlib.crc32(content) != member.crc32:
        raise _corrupt(file, f"the size or the checksum of its member {member.name!r} does not match")
    return content


def torch_folder(file: File, archive: Archive) -> str | None:
    """The folder in which `torch.save` wrote, with a final slash; None if it did not write this archive.

    Raises:
        CorruptError: the folder lacks its pickle.
    """
    names = {member.name for member in archive.members}
    for name in sorted(names):
        folder, _, rest = name.partition("/")
        if rest in (PICKLE, "data/0"):
            if f"{folder}/{PICKLE}" not in names:
                raise _corrupt(file, f"its member '{folder}/{PICKLE}' is missing")
            return f"{folder}/"
    return None


def _corrupt(file: File, what: str) -> CorruptError:
    return CorruptError(what, where=file.where)
