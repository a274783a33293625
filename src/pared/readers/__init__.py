"""Readers of model files of other programs; nothing in a file is executed, and torch is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pared.readers.folders.folder import list_file, list_folder, list_part
from pared.readers.folders.sets import refuse_cut
from pared.readers.listing import Listing

__all__ = ["open_listing", "refuse_cut"]


@contextmanager
def open_listing(path: Path, *, part: bool = False) -> Iterator[Listing]:
    """List the tensors of a file or folder; their numbers can be read while the context is open.

    A file that is one of several (a shard, or a file that an index names) stands for all of them.

    Args:
        path: the file or folder.
        part: whether to list of a folder only the model that is directly in it, as the part of a larger one.

    Raises:
        FileError: it cannot be read, its format is not supported, or a part of the model is missing.
        CorruptError: it contradicts itself.
        UnsafeError: it cannot be read without running code or within the memory limit.
    """
    with ExitStack() as files:
        if path.is_dir():
            yield list_part(path, files) if part else list_folder(path, files)
        else:
            yield list_file(path, files)
