"""The torch container of an artifact, written without torch: byte for byte what `torch.save` writes.

torch's own writer is built on miniz. Where zip leaves a choice, it writes no dates, puts sizes and checksums after
each member, aligns each member's content to 64 bytes by an extra field named "FB", and always ends with a zip64
directory. The standard `zipfile` cannot be told to do so: see `docs/decisions/020-zip-writer.md`.
"""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO, Final

_ALIGNMENT: Final = 64
_WIDE: Final = 0xFFFFFFFF  # sizes and offsets from here on are written as this, and in 64 bits in an extra field

_LOCAL: Final = struct.Struct("<4s2xH18xHH")  # signature, flags, lengths of name and extra field
_CENTRAL: Final = struct.Struct("<4s4xH6xIIIHH10xI")  # signature, flags, CRC-32, sizes, the same lengths, offset
_UTF8: Final = 0x0800
_SIZES_BEHIND: Final = 0x0008  # the content, unless that is empty

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
        stream: where the file begins; it need not be seekable.
        index: the first record.
        data: the second record, in pieces.
        nbytes: the size of the second record in bytes.

    >>> import io, zipfile
    >>> stream = io.BytesIO()
    >>> write_torch(stream, b"12", [b"34", b"5"], 3)
    >>> zipfile.ZipFile(stream).read("archive/data/1")
    b'345'
    """
    zip_file = _Zip(stream)
    # Each number of elements stands twice, as `pickle` writes it, without its frame and end.
    words = (pickle.dumps(size, protocol=2)[2:-1] for size in (len(index), nbytes) for _ in range(2))
    zip_file.add("data.pkl", _PICKLE % tuple(words))
    zip_file.add(".format_version", b"1")
    zip_file.add(".storage_alignment", str(_ALIGNMENT).encode())
    zip_file.add("byteorder", b"little")
    zip_file.add("data/0", index)
    zip_file.add_pieces("data/1", data, nbytes)
    zip_file.add("version", b"3\n")
    zip_file.add(".data/serialization_id", f"{_NAMES_HASH}{zip_file.fingerprint:020d}".encode())
    zip_file.close()


class _Zip:
    """A zip archive of uncompressed members, written from beginning to end.

    Attributes:
        fingerprint: torch's hash of the checksums of all members so far.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._position = 0
        self._directory: list[bytes] = []
        self.fingerprint = 0

    def add(self, name: str, content: bytes) -> None:
        self.add_pieces(name, (content,), len(content))

    def add_pieces(self, name: str, pieces: Iterable[bytes | memoryview], nbytes: int) -> None:
        """Add a member whose content comes in pieces, `nbytes` bytes in total."""
        path, start = f"archive/{name}".encode(), self._position
        flags = _UTF8 | (_SIZES_BEHIND if nbytes else 0)
        extra = _wide_field((nbytes, 0), start)
        extra += _padding(start + _LOCAL.size + len(path) + len(extra))
        self._write(_LOCAL.pack(b"PK\x03\x04", flags, len(path), len(extra)) + path + extra)
        crc32 = 0
        content = self._position
        for piece in pieces:
            self._write(piece)
            crc32 = zlib.crc32(piece, crc32)
        assert self._position - content == nbytes
        if nbytes:
            layout = "<4sIQQ" if max(nbytes, start) >= _WIDE else "<4sIII"
            self._write(struct.pack(layout, b"PK\x07\x08", crc32, nbytes, nbytes))
            seed = self.fingerprint  # combined as torch combines hashes
            self.fingerprint = (seed ^ (crc32 + 0x9E3779B9 + (seed << 6) + (seed >> 2))) & 0xFFFFFFFFFFFFFFFF
        extra = _wide_field((nbytes, nbytes), start)
        size, offset = min(nbytes, _WIDE), min(start, _WIDE)
        head = _CENTRAL.pack(b"PK\x01\x02", flags, crc32, size, size, len(path), len(extra), offset)
        self._directory.append(head + path + extra)

    def close(self) -> None:
        start, directory, count = self._position, b"".join(self._directory), len(self._directory)
        end, nbytes = start + len(directory), len(directory)
        self._write(directory)
        self._write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 0x31E, 45, 0, 0, count, count, nbytes, start))
        self._write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
        self._write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, nbytes, min(start, _WIDE), 0))

    def _write(self, piece: bytes | memoryview) -> None:
        self._stream.write(piece)
        self._position += len(piece)


def _wide_field(sizes: tuple[int, int], start: int) -> bytes:
    """The zip64 extra field: the two sizes of a member and its offset, as far as 32 bits cannot hold them."""
    values = [*(sizes if sizes[0] >= _WIDE else ()), *((start,) if start >= _WIDE else ())]
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _padding(start: int) -> bytes:
    """An extra field that begins at byte `start` of the file and ends at a multiple of 64."""
    length = -(start + 4) % _ALIGNMENT
    return b"FB" + struct.pack("<H", length) + b"Z" * length
