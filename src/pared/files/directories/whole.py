"""Folders and files that appear when all of them is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pared.errors import FileError
from pared.files.directories.temporary import temporary_folder
from pared.files.directories.writable import writing_to


def check_vacant(path: Path) -> None:
    """Check that a folder or file may be written here, before work begins.

    Raises:
        FileError: there is something already that is not an empty folder.
    """
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise FileError(
            "is there already, and is not an empty folder" if path.is_dir() else "is there already",
            where=str(path),
            remedy=f"Choose another {'folder to write to' if path.is_dir() else 'name'}, or delete this one.",
        )


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another name for a folder or file that is to be made, which becomes its own when all is written.

    After an error nothing is left.

    Args:
        path: the folder or file; nothing may be there but an empty folder.

    Raises:
        FileError: there is something already, or it cannot be written.
    """
    check_vacant(path)
    final = Path(os.path.realpath(path))
    with writing_to(path.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(final.parent) as around:
            made = around / final.name
            yield made
            if final.is_dir():
                final.rmdir()  # which fails if anything was put there meanwhile
            made.replace(final)
