"""The system's errors about a directory that cannot be written, as errors of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pared.errors import FileError


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Turn the system's errors about a directory that cannot be written into FileError."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"cannot be written: {error.strerror or error}",
            where=str(directory),
            remedy="Choose another directory, or change its permissions or free space.",
        ) from error
