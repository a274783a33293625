"""A container that lies or is damaged, and other files: refused, and every kind of damage has its own words."""

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.artifact.envelope import open_records
from pared.errors import CorruptError, FileError, ParedError
from tests.artifact.artifacts import INDEX, PT, SAFE, parse, pt
from tests.mutations import mutations


def members() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(PT)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(content: dict[str, bytes], compression: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, value in content.items():
            archive.writestr(name, value)
        archive.comment = comment
    return file.getvalue()


def compressed(name: str) -> bytes:
    """The zip with one member deflated."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key, value in members().items():
            archive.writestr(key, value, zipfile.ZIP_DEFLATED if key == name else zipfile.ZIP_STORED)
    return file.getvalue()


def without_member(name: str) -> bytes:
    return zipped({key: value for key, value in members().items() if key != name})


def with_member(name: str, value: bytes) -> bytes:
    return zipped(members() | {name: value})


def flipped(needle: bytes) -> bytes:
    position = PT.index(needle)
    return PT[:position] + bytes([PT[position] ^ 1]) + PT[position + 1 :]


FILES: dict[str, tuple[bytes, type[FileError], str]] = {
    "a truncated zip": (
        PT[:-30],
        CorruptError,
        "its zip directory cannot be read (File is not a zip file): it is truncated or damaged",
    ),
    "a missing record": (without_member("archive/data/1"), CorruptError, "its member 'data/1' is missing"),
    "a missing pickle": (without_member("archive/data.pkl"), CorruptError, "its member 'archive/data.pkl' is missing"),
    "an extra record": (
        with_member("archive/data/2", b""),
        CorruptError,
        "it has a member 'data/2', which no artifact has",
    ),
    "an extra member": (
        with_member("evil.py", b"import os"),
        CorruptError,
        "it has a member 'evil.py', which no artifact has",
    ),
    "compressed members": (
        zipped(members(), zipfile.ZIP_DEFLATED),
        FileError,
        "is a torch file, not an artifact of pared",
    ),
    "compressed data": (
        compressed("archive/data/1"),
        CorruptError,
        "its member 'data/1' is compressed or encrypted, which torch never does",
    ),
    "a large note": (
        with_member("archive/version", b"3" * 5000),
        CorruptError,
        "its member 'version' has 5,000 bytes, more than torch writes",
    ),
    "a flipped index": (
        flipped(INDEX.to_bytes()[50:80]),
        CorruptError,
        "the checksum of its member 'archive/data/0' does not match",
    ),
    "a flipped pickle": (
        flipped(b"storage"),
        CorruptError,
        "the checksum of its member 'archive/data.pkl' does not match",
    ),
    "a comment": (
        zipped(members(), comment=b"hidden"),
        CorruptError,
        "it has bytes that do not belong to any member of its archive",
    ),
    "a state dict": (pt(b"", b"").replace(b"index", b"shape"), FileError, "is a torch file, not an artifact of pared"),
    "another zip": (zipped({"a.txt": b"hello"}), FileError, "is a zip archive, not an artifact of pared"),
    "a web page": (b"<!DOCTYPE html>", FileError, "is a web page or an XML file, not an artifact of pared"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\n",
        FileError,
        "is a Git LFS pointer in the place of the file, not an artifact of pared",
    ),
    "text": (b"hello", FileError, "is of an unknown kind, not an artifact of pared"),
    "another safetensors": (
        safetensors.numpy.save({"index": np.zeros(1, np.uint8)}),
        FileError,
        "is a .safetensors file, not an artifact of pared",
    ),
    "a safetensors record missing": (
        safetensors.numpy.save({"index": np.zeros(1, np.uint8)}, {"format": "pared"}),
        CorruptError,
        "its tensor 'data' is missing",
    ),
    "a safetensors record of floats": (
        safetensors.numpy.save({"index": np.zeros(1, np.uint8), "data": np.zeros(1, np.float32)}, {"format": "pared"}),
        CorruptError,
        "it has a tensor 'data' of F32, which no artifact has",
    ),
    "a safetensors record too many": (
        safetensors.numpy.save({name: np.zeros(1, np.uint8) for name in ("index", "data", "x")}, {"format": "pared"}),
        CorruptError,
        "it has a tensor 'x' of U8, which no artifact has",
    ),
    "safetensors and more": (
        SAFE + b"more",
        CorruptError,
        f"its tensors end at byte {len(SAFE):,}, and the file has {len(SAFE) + 4:,}: "
        "the rest does not belong to any tensor",
    ),
    "half of safetensors": (
        SAFE[:-10],
        CorruptError,
        f"its tensors end at byte {len(SAFE):,}, and the file has {len(SAFE) - 10:,}: it is truncated",
    ),
    "half a header": (SAFE[:100], CorruptError, "its header has 192 bytes, and the file 100: it is truncated"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_container_that_lies_is_refused(kind: str) -> None:
    file, error_type, words = FILES[kind]
    with pytest.raises(FileError) as error:
        parse(file)
    assert type(error.value) is error_type
    assert str(error.value).splitlines()[0] == f"file: {words}"


def test_bytes_between_members_are_refused() -> None:
    """A zip may hide anything between its members; the directory then points behind it."""
    end = PT.index(b"PK\x01\x02")
    shifted = PT[:end] + b"hidden" + PT[end:]
    eocd = shifted.rindex(b"PK\x05\x06")
    offset = struct.unpack_from("<I", shifted, eocd + 16)[0]
    zip64 = shifted.rindex(b"PK\x06\x06")
    moved = bytearray(shifted)
    struct.pack_into("<I", moved, eocd + 16, offset + 6)
    struct.pack_into("<Q", moved, zip64 + 48, offset + 6)
    struct.pack_into("<Q", moved, shifted.rindex(b"PK\x06\x07") + 8, zip64)
    with pytest.raises(CorruptError) as error:
        parse(bytes(moved))
    assert error.value.what == "it has bytes that do not belong to any member of its archive"


def central(field: int, code: str, value: int, member: str = "archive/data/1") -> bytes:
    """The zip with one field of its directory changed."""
    file = bytearray(PT)
    entry = file.rindex(member.encode()) - 46
    struct.pack_into(code, file, entry + field, value)
    return bytes(file)


DIRECTORY = {
    "two sizes": (central(24, "<I", 5), "its member 'archive/data/1' has two sizes"),
    "a member beyond the file": (
        central(42, "<I", 10**6),
        "its member 'archive/data/1' begins outside the file",
    ),
    "a member that is another": (
        central(42, "<I", 0),
        "its member 'archive/data/1' and the archive's directory contradict each other",
    ),
    "another method": (
        central(10, "<H", 8),
        "its member 'archive/data/1' and the archive's directory contradict each other",
    ),
    "an overlap": (
        central(20, "<Q", (10**4 << 32) | 10**4),
        "its member 'archive/data/1' reaches into what follows it",
    ),
}


@pytest.mark.parametrize("kind", DIRECTORY)
def test_a_directory_that_lies_is_refused(kind: str) -> None:
    file, words = DIRECTORY[kind]
    with pytest.raises(CorruptError) as error:
        parse(file)
    assert error.value.what == words


@settings(deadline=None, max_examples=400)
@given(st.data(), st.sampled_from([PT, SAFE]))
@pytest.mark.slow
def test_mutated_files_are_refused_or_read_right(draw: st.DataObject, file: bytes) -> None:
    """Whatever is flipped, cut or inserted: an error of ours, or an index that is sound for the data there are."""
    mutated = draw.draw(mutations(file, most=3))
    try:
        found = parse(mutated)
    except ParedError:
        return
    assert found == INDEX


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    words = {
        "missing": "cannot be read: No such file or directory",
        "empty": "is empty",
        "pipe": "is not a regular file",
        ".": "is a directory",
    }
    for name, what in words.items():
        with pytest.raises(FileError) as error, open_records(tmp_path / name):
            pass
        assert error.value.what == what
