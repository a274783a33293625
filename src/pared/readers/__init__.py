"""Readers of model files of other programs; nothing in a file is executed, and torch is not imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pared.files.disk import open_file
from pared.readers.folders import list_folder
from pared.readers.kinds import list_tensors
from pared.readers.listing import Listing


@contextmanager
def open_listing(path: Path) -> Iterator[Listing]:
    """List the tensors of a file or folder; their numbers can be read while the context is open.

    Raises:
        FileError: it cannot be read, or its format is not supported.
        CorruptError: it contradicts itself.
        UnsafeError: it cannot be read without running code or within the memory limit.
    """
    with ExitStack() as files:
        if path.is_dir():
            yield list_folder(path, files)
        else:
            yield list_tensors(files.enter_context(open_file(path)))
