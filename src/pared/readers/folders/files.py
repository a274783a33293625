"""The files of a folder, found without opening any: sizes of the regular ones, and what the others are."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pared.errors import FileError
from pared.files.disk import reading

_MOST_FILES: Final = 10_000
_DEEPEST: Final = 64  # folders within folders; no model needs more than a few


@dataclass(frozen=True)
class Found:
    """The files of a folder.

    Args:
        sizes: the size of every regular file, by relative path, sorted; links to files are followed.
        odd: what every other entry is that is not a plain directory, by relative path: a link that leads nowhere, a
            link to a directory, a pipe. They are never opened.
    """

    sizes: Mapping[str, int]
    odd: Mapping[str, str]


def find_files(folder: Path, *, deep: bool = True) -> Found:
    """Find the files of a folder.

    Links to files are followed, since Hugging Face's cache consists of them; links to directories are not.

    Args:
        folder: the directory.
        deep: whether to look into the folders in it.

    Raises:
        FileError: it cannot be read, or holds more than 10,000 files in all its folders.
    """
    sizes: dict[str, int] = {}
    odd: dict[str, str] = {}
    for path in _entries(folder, deep):
        name = path.relative_to(folder).as_posix()
        what = _odd(path)
        if what:
            odd[name] = what
            continue
        if deep and len(sizes) == _MOST_FILES:
            raise FileError(
                f"holds more than {_MOST_FILES:,} files", where=str(folder), remedy="Pass the folder of one model."
            )
        with reading(path):
            sizes[name] = path.stat().st_size
    return Found(dict(sorted(sizes.items())), dict(sorted(odd.items())))


def _entries(folder: Path, deep: bool) -> Iterator[Path]:
    """All entries that are not plain directories; links to directories are among them, and not followed."""
    for here, directories, names in walk(folder):
        with reading(here):
            found = [here / name for name in names]
            found += [here / name for name in directories if (here / name).is_symlink()]
        if not deep:
            directories.clear()
        yield from found


def _odd(path: Path) -> str:
    """What an entry is if it is not a regular file, or a link to one; "" if it is."""
    try:
        kind = path.stat().st_mode
    except OSError:
        return "a link that leads nowhere"  # or in a circle
    if stat.S_ISREG(kind):
        return ""
    return "a link to a directory" if stat.S_ISDIR(kind) else "a pipe, a socket or a device"


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each directory below a folder and the folder itself, with the names of its directories and of everything else.

    Links to directories are among the directories, and not followed. What is removed from the list of directories
    before the next step is left out, as with `os.walk`; that one does not tell of directories that cannot be read.

    Raises:
        FileError: a directory cannot be read, or they are nested too deep.
    """
    waiting = [(folder, 0)]
    while waiting:
        place, depth = waiting.pop()
        if depth > _DEEPEST:
            raise FileError(
                f"holds folders nested more than {_DEEPEST} deep",
                where=str(folder),
                remedy="Pass the folder of the model itself.",
            )
        directories: list[str] = []
        names: list[str] = []
        with reading(place), os.scandir(place) as entries:
            for entry in entries:
                (directories if _is_directory(entry) else names).append(entry.name)
        directories.sort()
        yield place, directories, names
        below = [place / name for name in directories]
        waiting += [(path, depth + 1) for path in reversed(below) if not path.is_symlink()]


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # links in a circle, for instance: what opens it says so
