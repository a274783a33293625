"""Files: opened without being read, written so that a crash leaves either the old file or the new one."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pared.errors import ConfigError, FileError
from pared.files.memory_limit import MemoryLimit


def as_path(value: object, where: str) -> Path:
    """What a caller gave for a path, of which the system says what is there, if anything is.

    Raises:
        ConfigError: it is none.
        FileError: the system refuses it: a name too long, links in a circle, a directory that may not be searched.

    >>> as_path("models", "save").name
    'models'
    """
    named = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(named, str):
        path = Path(named)
        with reading(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
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
        """The memory that reading it may take: whoever makes something of it for each of its parts, counts that."""
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
        # Whoever still holds a view of the data keeps the map alive; it then closes with the last view.
        with contextlib.suppress(BufferError):
            data.release()
            mapped.close()


def _map(path: Path, where: str) -> tuple[BinaryIO, mmap.mmap]:
    try:
        # Opening a pipe would wait for its writer, and a device has no end.
        if path.exists() and not path.is_file():
            what = "is a directory" if path.is_dir() else "is no regular file"
            raise FileError(what, where=where, remedy="Pass the path of a file.")
        if path.stat().st_size == 0:
            raise FileError("is empty", where=where, remedy="Fetch the file again.")
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
    """Turn what the system says about a path that cannot be read into an error of ours."""
    try:
        yield
    except FileError:  # which is a ValueError too
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no system has, with a NUL in it for instance
        raise _unreadable(str(path), error) from error


def _unreadable(where: str, error: OSError | ValueError) -> FileError:
    why = getattr(error, "strerror", None) or str(error)
    return FileError(f"cannot be read: {why}", where=where, remedy="Check the path and its permissions.")


def forget(view: memoryview) -> None:
    """Give back the memory of a mapped file's pages that were read through a view; they are read again when needed.

    Args:
        view: of a file's data; of other memory nothing is given back.
    """
    mapped = view.obj
    if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED") or not view.nbytes:
        return
    start = _address(view) - _address(memoryview(mapped))
    first = start + -start % mmap.PAGESIZE  # the page before may be another's too
    if start + view.nbytes > first:
        mapped.madvise(mmap.MADV_DONTNEED, first, start + view.nbytes - first)


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


def make_directory(directory: Path) -> None:
    """Make a directory if it is missing, and see that files can be written there: a check before work begins.

    Raises:
        FileError: they cannot.
    """
    probe = directory / _temporary_name()
    with writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()


def write_atomic(path: Path, write: Callable[[BinaryIO], object], *, within: Path | None = None) -> None:
    """Write a file under a temporary name, and rename it when every byte is on the disk.

    Args:
        path: of the file; its directory is made if it is missing.
        write: called once with the open file; if it raises, no trace is left and the old file still stands.
        within: where the temporary file is, on the same file system; default: beside the file. Only there is it left
            if the process is killed.

    Raises:
        FileError: the directory cannot be written.
    """
    temporary = (within or path.parent) / _temporary_name()
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


def _temporary_name() -> str:
    return f".pared-{secrets.token_hex(4)}.tmp"


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Turn what the system says about a place that cannot be written into an error of ours."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"cannot be written: {error.strerror or error}",
            where=str(directory),
            remedy="Choose another directory, or change its permissions or free space.",
        ) from error


def _sync_directory(directory: Path) -> None:
    """Make the new name as durable as the file; Windows does so by itself, and opens no directories."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
