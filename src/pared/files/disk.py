"""Files: opened without being read, written so that a crash leaves either the old file or the new one."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from pared.errors import DAMAGED, ConfigError, FileError
from pared.files.directories.temporary import clear, keep, temporary_name
from pared.files.directories.writable import writing_to
from pared.files.memory_limit import MemoryLimit

_URL: Final = re.compile(r"[a-z][a-z0-9+.-]+:/{1,2}[^/]")  # "s3://a", of which a `Path` keeps one slash


def as_path(value: object, where: str) -> Path:
    """A path that a caller gave to the function or option `where`; nothing need exist there.

    Raises:
        ConfigError: it is something else.
        FileError: it is a URL; or the system refuses it: the name is too long, links form a circle, a directory may not
            be searched.

    >>> as_path("models", "save").name
    'models'
    >>> as_path("s3://models/a", "save")
    Traceback (most recent call last):
    pared.errors.FileError: s3://models/a: is a URL, and files are mapped into memory
      Mount the storage, or copy the files, and pass their path: only compress, expand, fit and evaluate take URLs.
    """
    named = os.fspath(value) if isinstance(value, os.PathLike) else value
    if named == "":
        raise ConfigError(
            "the path is empty", where=where, remedy='Pass the path of a file or folder; "." is this one.'
        )
    if isinstance(named, str):
        path = Path(named)
        with reading(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
            return path
        if _URL.match(named):
            raise FileError(
                "is a URL, and files are mapped into memory",
                where=named,
                remedy="Mount the storage, or copy the files, and pass their path: only compress, expand, fit and "
                "evaluate take URLs.",
            )
        return path
    raise ConfigError(f"expected a path, got {type(value).__name__}", where=where, remedy="Pass a string or a Path.")


@dataclass(frozen=True, eq=False)
class File:
    """An open file.

    Args:
        where: its name, for messages.
        data: all its bytes, mapped into memory rather than read.
        stream: the same bytes as a seekable stream.
        path: where it is; None for bytes in memory.
    """

    where: str
    data: memoryview
    stream: BinaryIO
    path: Path | None = None

    @cached_property
    def memory(self) -> MemoryLimit:
        """The memory that reading it may take: code that makes objects from its contents has to count them."""
        return MemoryLimit(self.where, len(self.data))


@contextmanager
def open_file(source: bytes | str | os.PathLike[str], where: str = "") -> Iterator[File]:
    """Open a file, or bytes as if they were one. Views of its data stay valid as long as they are held.

    Args:
        source: a path, or a file's bytes.
        where: the name for messages; default: the path.

    Raises:
        FileError: there is no such file, it is empty, or it cannot be read.

    >>> with open_file(b"abc") as file:
    ...     bytes(file.data[1:])
    b'bc'
    """
    if isinstance(source, bytes):
        yield File(where or "bytes in memory", memoryview(source), io.BytesIO(source))
        return
    path = Path(source)
    stream, mapped = _map(path, where or str(path))
    data = memoryview(mapped)
    try:
        yield File(where or str(path), data, stream, path)
    finally:
        stream.close()
        # A view of the data that is still held keeps the map alive, which then closes with the last view.
        with contextlib.suppress(BufferError):
            data.release()
            mapped.close()


def part_of(file: File, begin: int, end: int) -> File:
    """The bytes of a file from one offset to another, as if they were a file of their own.

    >>> with open_file(b"abc") as file:
    ...     part_of(file, 1, 3).stream.read()
    b'bc'
    """
    data = file.data[begin:end]
    return File(file.where, data, _Stream(data))


class _Stream(io.BytesIO):
    """Bytes in memory as a stream that copies only what is read."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data = data
        self._position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, (0, self._position, len(self._data))[whence] + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, length: int | None = -1) -> bytes:
        end = len(self._data) if length is None or length < 0 else self._position + length
        piece = bytes(self._data[self._position : end])
        self._position += len(piece)
        return piece


def _map(path: Path, where: str) -> tuple[BinaryIO, mmap.mmap]:
    try:
        # Opening a pipe would wait for its writer, and a device has no end.
        if path.exists() and not path.is_file():
            what = "is a directory" if path.is_dir() else "is not a regular file"
            raise FileError(what, where=where, remedy="Pass the path of a file.")
        if path.stat().st_size == 0:
            raise FileError("is empty", where=where, remedy=DAMAGED)
        stream = path.open("rb")
        try:
            return stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except BaseException:
            stream.close()
            raise
    except OSError as error:
        raise _unreadable(where, error) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's errors about a path that cannot be read into FileError."""
    try:
        yield
    except FileError:  # which is also a ValueError
        raise
    except (OSError, ValueError) as error:  # ValueError: an impossible name, one with a NUL for instance
        raise _unreadable(str(path), error) from error


def _unreadable(where: str, error: OSError | ValueError) -> FileError:
    why = getattr(error, "strerror", None) or str(error)
    return FileError(f"cannot be read: {why}", where=where, remedy="Check the path and its permissions.")


def forget(view: memoryview) -> None:
    """Let the system drop the pages of a mapped file that were read through a view; they are read again when needed.

    Args:
        view: a part of `File.data`; for other memory nothing happens.
    """
    mapped = view.obj
    if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED") or not view.nbytes:
        return
    start = _address(view) - _address(memoryview(mapped))
    first = start + -start % mmap.PAGESIZE  # the page before may be in use by a neighbour
    if start + view.nbytes > first:
        mapped.madvise(mmap.MADV_DONTNEED, first, start + view.nbytes - first)


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


def make_directory(directory: Path) -> None:
    """Make a directory if it is missing, and check that files can be written there, before work begins.

    Raises:
        FileError: they cannot be.
    """
    probe = directory / temporary_name()
    with writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink(missing_ok=True)  # another run may have cleared it


def check_directory(directory: Path) -> None:
    """Check that a directory can be made, or written where it is there already, and leave nothing behind.

    Raises:
        FileError: it cannot be.
    """
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        make_directory(directory)
    finally:
        for place in missing:
            with contextlib.suppress(OSError):  # something else is in it by now, or it was not made
                place.rmdir()


def write_atomic(path: Path, write: Callable[[BinaryIO], object], *, within: Path | None = None) -> None:
    """Write a file under a temporary name, and rename it when every byte is on the disk.

    Args:
        path: the file; its directory is made if it is missing.
        write: called once with the open file. If it raises, the temporary file is removed and the old file stays.
        within: the directory of the temporary file, on the same file system; default: beside the file. If the process
            is killed, the temporary file is left there until the next call clears it.

    Raises:
        FileError: the directory cannot be written, or the path is a device or a pipe.
    """
    folder = within or path.parent
    temporary = folder / temporary_name()
    with writing_to(path.parent):
        if path.exists() and not (path.is_file() or path.is_dir()):  # of a directory the system says so
            raise FileError(
                "is a device or a pipe, which the file would replace",
                where=str(path),
                remedy="Choose the name of a file.",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        clear(folder)
        try:
            with _held(temporary) as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
                if os.name != "nt":  # as long as it is held
                    temporary.replace(path)
            if os.name == "nt":
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


@contextmanager
def _held(temporary: Path) -> Iterator[BinaryIO]:
    """Create a file and hold it, so that others let it be."""
    while True:
        with temporary.open("xb") as stream:
            if keep(temporary, stream.fileno()):
                yield stream
                return


def _sync_directory(directory: Path) -> None:
    """Make the new name as durable as the file. Windows does so on its own, and cannot open directories."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
