"""What is inside files of other kinds, found without running anything in them and without torch."""

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
    """The tensors of a file or of a folder; their numbers can be read as long as it is open.

    Args:
        path: of the file or the folder.

    Raises:
        FileError: it cannot be read, or is of a kind that cannot be listed.
        CorruptError: it contradicts itself.
        UnsafeError: it cannot be understood without running code, or would take memory without bound.
    """
    with ExitStack() as files:
        if path.is_dir():
            yield list_folder(path, files)
        else:
            yield list_tensors(files.enter_context(open_file(path)))
