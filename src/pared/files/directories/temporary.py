"""Temporary files and folders: who writes one holds a lock on it, by which those of killed processes are known."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

_NAME: Final = re.compile(r"\.pared-[0-9a-f]{8}\.tmp")
_DAY: Final = 86_400.0  # seconds


def temporary_name() -> str:
    """A name that nothing else has."""
    return f".pared-{secrets.token_hex(4)}.tmp"


def keep(path: Path, descriptor: int) -> bool:
    """Hold a file or folder that was just made until it is closed.

    Returns:
        False if another run clears it, or has done so before it was held.
    """
    return _lock(descriptor) is not False and path.exists()


def _lock(descriptor: int) -> bool | None:
    """Lock an open file or folder until it is closed; False if another run has; None if the system cannot."""
    if sys.platform == "win32":
        return None  # where a file that is open cannot be deleted
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug("a temporary file is not locked: %s", error)
        return None
    return True


def clear(directory: Path) -> None:
    """Delete the temporary files and folders that killed processes have left in a directory."""
    try:
        with os.scandir(directory) as entries:
            left = [Path(entry.path) for entry in entries if _NAME.fullmatch(entry.name) and not entry.is_symlink()]
    except OSError as error:  # what cannot be cleared takes space, and does no other harm
        log.info("%s cannot be cleared of temporary files: %s", directory, error)
        return
    for path in left:
        _delete_abandoned(path)


@contextmanager
def temporary_folder(directory: Path) -> Iterator[Path]:
    """A folder in a directory that is removed at the end; those of killed processes are cleared first."""
    clear(directory)
    folder, descriptor = _made(directory)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _made(directory: Path) -> tuple[Path, int | None]:
    """A new folder, and the descriptor by which it is held as long as that is open."""
    while True:
        folder = directory / temporary_name()
        folder.mkdir()
        if sys.platform == "win32":
            return folder, None
        with contextlib.suppress(FileNotFoundError):  # another run has cleared it before it was opened
            descriptor = os.open(folder, os.O_RDONLY)
            if keep(folder, descriptor):
                return folder, descriptor
            os.close(descriptor)


def _delete_abandoned(path: Path) -> None:
    try:
        if sys.platform == "win32":
            if time.time() - path.stat().st_mtime > _DAY:
                _delete(path)
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _lock(descriptor):
                _delete(path)
        finally:
            os.close(descriptor)
    except OSError as error:  # another user's, for instance: no reason to keep the others
        log.info("%s cannot be deleted: %s", path, error)


def _delete(path: Path) -> None:
    log.info("%s, which a killed process has left, is deleted", path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
