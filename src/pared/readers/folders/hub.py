"""The cache of the Hugging Face hub: `models--ORG--NAME/` with `snapshots/COMMIT/` of links into `blobs/`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pared.errors import FileError
from pared.files.disk import reading

_SNAPSHOTS: Final = "snapshots"
_BLOBS: Final = "blobs"
_MAIN: Final = "refs/main"
_LONGEST_REF: Final = 100
_MOST_HOPS: Final = 40  # as the system follows


def snapshot_of(folder: Path) -> Path:
    """The snapshot that a folder of the cache stands for; any other folder itself.

    Args:
        folder: `models--ORG--NAME`, or `snapshots` in it: the snapshot is that of `refs/main`, or else the only one.

    Raises:
        FileError: there are several snapshots and no `refs/main`, or none at all; or the folder cannot be read.
    """
    with reading(folder):
        top = folder.parent if folder.name == _SNAPSHOTS and (folder.parent / _BLOBS).is_dir() else folder
        snapshots = top / _SNAPSHOTS
        if not ((top / _BLOBS).is_dir() and snapshots.is_dir()):
            return folder
    main = top / _MAIN
    with reading(top):
        commit = main.read_text("utf-8", "replace")[:_LONGEST_REF].strip() if main.is_file() else ""
        found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    named = next((path for path in found if path.name == commit), None)
    if named is None and len(found) != 1:
        what = f"holds the snapshots {', '.join(path.name for path in found[:3])}" if found else "holds no snapshot"
        raise FileError(
            f"is a folder of Hugging Face's cache, and {what}",
            where=str(folder),
            remedy="Pass the folder of one snapshot." if found else "Fetch the model: hf download ORG/NAME.",
        )
    return named or found[0]


def blobs_of(folder: Path) -> Path | None:
    """The folder into which the links of a snapshot lead; None for a folder that is not a snapshot."""
    real = Path(os.path.realpath(folder))
    while real.parent != real:
        if real.parent.name == _SNAPSHOTS and (real.parent.parent / _BLOBS).is_dir():
            return real.parent.parent / _BLOBS
        real = real.parent
    return None


def is_within(folder: Path, name: str) -> bool:
    """Whether a file of a folder lies in it, wherever links lead: of a snapshot, its cache's blobs belong to it."""
    real = Path(os.path.realpath(folder / name))
    homes = (Path(os.path.realpath(folder)), blobs_of(folder))
    return any(home is not None and real.is_relative_to(home) for home in homes)


def places_of(path: Path) -> Iterator[Path]:
    """Where a file may have its neighbours: where it is, and where the links lead that it consists of.

    A blob of the cache, whose name says nothing, has them in the snapshots with a link to it.
    """
    for _ in range(_MOST_HOPS):
        yield path
        if not path.is_symlink():
            break
        path = Path(os.path.normpath(path.parent / path.readlink()))
    if path.parent.name == _BLOBS and (path.parent.parent / _SNAPSHOTS).is_dir():
        for link in sorted((path.parent.parent / _SNAPSHOTS).rglob("*")):
            if link.is_symlink() and os.path.realpath(link) == os.path.realpath(path):
                yield link
