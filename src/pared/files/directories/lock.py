"""One run at a time owns a directory: two that write to one place would mix what they write."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from pared.errors import FileError
from pared.files.directories.writable import writing_to

LOCK: Final = ".pared-lock"
SHORT_WAIT: Final = 60.0  # seconds: for work that only writes files which are ready

_OWNERS: Final[dict[str, int]] = {}  # by the real path of a lock of this process, the thread that has it


@contextmanager
def owned(directory: Path, *, wait: float = 0.0, file: str = LOCK) -> Iterator[None]:
    """Own a directory as long as the context lasts. The lock ends with the process, however that ends.

    Args:
        directory: it has to exist.
        wait: how many seconds to wait for another run that owns it.
        file: the one that is locked and, at the end, removed; its path within the directory.

    Raises:
        FileError: another run still owns it, of this process or of another one, or this thread does already, for which
            nothing waits; or no file can be made there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, owned(Path(folder)):
    ...     try:
    ...         with owned(Path(folder)):
    ...             pass
    ...     except FileError as error:
    ...         error.what
    'this very run writes to this directory already'
    """
    path = directory / file
    name = os.path.realpath(path)
    if _OWNERS.get(name) == threading.get_ident():
        raise FileError(
            "this very run writes to this directory already",
            where=str(directory),
            remedy="Choose another directory for what is written while it goes on.",
        )
    with writing_to(directory):
        # Not shared between threads, which are two runs as processes are.
        lock = FileLock(path, timeout=wait, thread_local=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise FileError(
                "another run writes to this directory",
                where=str(directory),
                remedy="Wait until it has ended, or choose another directory.",
            ) from error
    _OWNERS[name] = threading.get_ident()
    try:
        yield
    finally:
        _OWNERS.pop(name, None)
        if lock.is_locked:  # not in a forked child, whose parent goes on
            with contextlib.suppress(OSError):  # Windows deletes it on release
                path.unlink()
            lock.release()
