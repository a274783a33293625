"""The files beside the weights, copied so that a Hugging Face folder keeps its configuration and tokenizer."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from pared.files.directories.writable import writing_to
from pared.files.disk import write_atomic
from pared.readers.folders.names import is_weights

# Folders in which sentence-transformers keeps layers that follow the model: their weights are copied, too.
_LAYER: Final = re.compile(r"\d+_\w+$")
_OURS: Final = frozenset(("deploy.yaml", "engine.json"))


def find_side_files(folder: Path, output: Path) -> Iterator[str]:
    """The files of a folder that hold no weights, as sorted relative paths.

    Args:
        folder: the source.
        output: a folder to skip, if it is inside `folder`.
    """
    destination = os.path.realpath(output)
    for place, directories, names in os.walk(folder):
        here = Path(place)
        # Hidden folders hold caches and histories.
        seen = (name for name in directories if not name.startswith("."))
        directories[:] = sorted(name for name in seen if os.path.realpath(here / name) != destination)
        for name in sorted(names):
            path = here / name
            if not name.startswith(".") and path.is_file() and (_LAYER.match(here.name) or not _is_weights(name)):
                yield path.relative_to(folder).as_posix()


def _is_weights(name: str) -> bool:
    """Whether a file holds weights, is an index of weights, or belongs to an artifact."""
    return is_weights(name) or name in _OURS


def copy(folder: Path, names: Collection[str], output: Path, within: Path) -> None:
    """Copy files, each completely or not at all.

    Raises:
        FileError: one cannot be read or written.
    """
    with writing_to(output):
        for name in names:
            with (folder / name).open("rb") as source:
                write_atomic(output / name, lambda file, source=source: shutil.copyfileobj(source, file), within=within)  # type: ignore[misc]  # bound now
