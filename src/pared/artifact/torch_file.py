"""An artifact's torch container, written without torch: the bytes that `torch.save` writes for the two records.

torch's own writer is built on miniz. What it does that zip leaves open: no dates, sizes and checksums behind each
member, extra fields named "FB" that move each member's content to a multiple of 64, and a zip64 directory always.
"""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO, Final

_ALIGNMENT: Final = 64
_WIDE: Final = 0xFFFFFFFF  # from here on, sizes and offsets stand in 64 bits elsewhere

_LOCAL: Final = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL: Final = struct.Struct("<4sHHHHHHIIIHHHHHII")
_UTF8: Final = 0x0800
_SIZES_BEHIND: Final = 0x0008  # the content, which an empty member does without

# torch's identifier of an archive begins with a hash of its members' names, which are always the same here.
_NAMES_HASH: Final = "05611085236196705294"

_PICKLE: Final = (
    b"\x80\x02}q\x00(X\x05\x00\x00\x00indexq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storageq"
    b"\x03ctorch\nByteStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06%btq\x07QK\x00%b\x85q\x08K\x01"
    b"\x85q\t\x89ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rX\x04\x00\x00\x00dataq\x0eh\x02((h\x03h\x04X\x01\x00"
    b"\x00\x001q\x0fh\x06%btq\x10QK\x00%b\x85q\x11K\x01\x85q\x12\x89h\n)Rq\x13tq\x14Rq\x15u."
)


def write_torch(stream: BinaryIO, index: bytes, data: Iterable[bytes | memoryview], nbytes: int) -> None:
    """Write the two records of an artifact as `torch.save` does.

    Args:
        stream: begins here; it need not be seekable.
        index: the first record.
        data: the second record, in pieces.
        nbytes: of the second record.

    >>> import io, zipfile
    >>> stream = io.BytesIO()
    >>> write_torch(stream, b"12", [b"34", b"5"], 3)
    >>> zipfile.ZipFile(stream).read("archive/data/1")
    b'345'
    """
    zip_file = _Zip(stream)
    zip_file.add("data.pkl", _pickle(len(index), nbytes))
    zip_file.add(".format_version", b"1")
    zip_file.add(".storage_alignment", str(_ALIGNMENT).encode())
    zip_file.add("byteorder", b"little")
    zip_file.add("data/0", index)
    zip_file.add_pieces("data/1", data, nbytes)
    zip_file.add("version", b"3\n")
    zip_file.add(".data/serialization_id", f"{_NAMES_HASH}{zip_file.fingerprint:020d}".encode())
    zip_file.close()


def _pickle(*sizes: int) -> bytes:
    """Torch's pickle of two tensors of so many bytes."""
    words = (pickle.dumps(size, protocol=2)[2:-1] for size in sizes for _ in range(2))  # without frame and end
    return _PICKLE % tuple(words)


@dataclass(frozen=True)
class _Member:
    name: bytes
    start: int
    nbytes: int
    crc32: int


class _Zip:
    """A zip archive, written from its beginning to its end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._position = 0
        self._members: list[_Member] = []
        self.fingerprint = 0

    def add(self, name: str, content: bytes) -> None:
        self.add_pieces(name, (content,), len(content))

    def add_pieces(self, name: str, pieces: Iterable[bytes | memoryview], nbytes: int) -> None:
        """Add a member whose content comes in pieces of so many bytes in all."""
        encoded, start = f"archive/{name}".encode(), self._position
        extra = _wide_fields((nbytes, 0), start)
        extra += _padding(start + _LOCAL.size + len(encoded) + len(extra))
        self._write(
            _LOCAL.pack(b"PK\x03\x04", 0, _flags(nbytes), 0, 0, 0, 0, 0, 0, len(encoded), len(extra)) + encoded + extra
        )
        crc32 = written = 0
        for piece in pieces:
            self._write(piece)
            crc32, written = zlib.crc32(piece, crc32), written + len(piece)
        assert written == nbytes
        if nbytes:
            self._write(
                struct.pack("<4sIQQ" if _is_wide(nbytes, start) else "<4sIII", b"PK\x07\x08", crc32, nbytes, nbytes)
            )
        self._members.append(_Member(encoded, start, nbytes, crc32))
        if nbytes:
            self.fingerprint = _combined(self.fingerprint, crc32)

    def close(self) -> None:
        start = self._position
        for member in self._members:
            self._write(_central(member))
        nbytes, count = self._position - start, len(self._members)
        self._write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 0x31E, 45, 0, 0, count, count, nbytes, start))
        self._write(struct.pack("<4sIQI", b"PK\x06\x07", 0, start + nbytes, 1))
        self._write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, nbytes, min(start, _WIDE), 0))

    def _write(self, piece: bytes | memoryview) -> None:
        self._stream.write(piece)
        self._position += len(piece)


def _flags(nbytes: int) -> int:
    return _UTF8 | (_SIZES_BEHIND if nbytes else 0)


def _is_wide(nbytes: int, start: int) -> bool:
    return nbytes >= _WIDE or start >= _WIDE


def _central(member: _Member) -> bytes:
    """The member in the archive's directory."""
    extra = _wide_fields((member.nbytes, member.nbytes), member.start)
    flags = _flags(member.nbytes)
    nbytes, start = min(member.nbytes, _WIDE), min(member.start, _WIDE)
    head = _CENTRAL.pack(
        b"PK\x01\x02",
        0,
        0,
        flags,
        0,
        0,
        0,
        member.crc32,
        nbytes,
        nbytes,
        len(member.name),
        len(extra),
        0,
        0,
        0,
        0,
        start,
    )
    return head + member.name + extra


def _wide_fields(sizes: tuple[int, int], start: int) -> bytes:
    """The extra field with those of sizes (of the content, and as it is stored) and offset that need 64 bits."""
    values = [*(sizes if sizes[0] >= _WIDE else ()), *((start,) if start >= _WIDE else ())]
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _padding(start: int) -> bytes:
    """An extra field that ends at a multiple of 64, where one that began there would."""
    length = -(start + 4) % _ALIGNMENT
    return b"FB" + struct.pack("<H", length) + b"Z" * length


def _combined(seed: int, value: int) -> int:
    """Torch's way to combine two hashes of 64 bits."""
    return (seed ^ (value + 0x9E3779B9 + (seed << 6) + (seed >> 2))) & 0xFFFFFFFFFFFFFFFF
