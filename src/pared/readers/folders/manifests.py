"""Folders of several models, as their own manifests describe them: pipelines of diffusers, sentence-transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from pared.errors import FileError
from pared.files.checks import Place
from pared.files.disk import open_file, reading
from pared.files.memory_limit import MemoryLimit
from pared.readers.folders.files import Found, find_files
from pared.readers.folders.names import DISTRIBUTED, is_read, is_training

_CONFIG: Final = "config.json"  # beside the weights of a model; schedulers and tokenizers have files of other names
_NBYTES_PER_BYTE: Final = 32  # an upper bound on Python's objects for each byte of JSON
_LARGEST: Final = 1 << 20  # bytes


def _pipeline(top: object) -> Iterator[str]:
    """The components in the `model_index.json` of diffusers: each a pair of library and class."""
    for name, value in top.items() if isinstance(top, dict) else ():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value):
            yield name


def _modules(top: object) -> Iterator[str]:
    """The modules in the `modules.json` of sentence-transformers; the first one may be the folder itself."""
    for value in top if isinstance(top, list) else ():
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            yield value["path"].rstrip("/")


# The file that describes a folder, and how to find the folders of its models in it.
_MANIFESTS: Final[dict[str, Callable[[object], Iterator[str]]]] = {
    "model_index.json": _pipeline,
    "modules.json": _modules,
}


def manifest_parts(folder: Path) -> tuple[str, ...]:
    """The folders that a folder's manifest names, relative to it, "" for the folder itself; () without a manifest.

    Raises:
        FileError: the folder cannot be read; CorruptError: the manifest is not JSON.
    """
    for name, find in _MANIFESTS.items():
        path = folder / name
        with reading(folder):
            is_there = path.is_file() and 0 < path.stat().st_size <= _LARGEST
        if not is_there:
            continue
        at = Place(str(path))
        with open_file(path) as file:
            MemoryLimit(str(path), len(file.data)).take(_NBYTES_PER_BYTE * len(file.data))
            parts = dict.fromkeys(find(at.json(bytes(file.data), "it")))
        return tuple(part for part in parts if _is_inside(folder, part))
    return ()


def _is_inside(folder: Path, part: str) -> bool:
    """Whether a part is a plain folder inside, or the folder itself."""
    if not part:
        return True
    plain = "/" not in part and "\\" not in part and "\0" not in part and not part.startswith(".")
    return plain and Path(os.path.realpath(folder / part)).is_relative_to(os.path.realpath(folder))


def model_parts(folder: Path) -> tuple[str, ...]:
    """The folders of the models of which a folder consists, as `manifest_parts`; () for a folder of one model.

    Raises:
        FileError: a part is missing, or has lost its weights.
        CorruptError: the manifest is not JSON.
    """
    parts = []
    for part in manifest_parts(folder):
        place = folder / part
        if not place.is_dir():
            raise FileError(
                "is a part of the model, and missing",
                where=str(place),
                remedy="Fetch it, or pass the folder of one part.",
            )
        found = files_of(folder, part)
        if any((is_read(name) or name.endswith(DISTRIBUTED)) and not is_training(name) for name in found.sizes):
            parts.append(part)
        elif part and _CONFIG in found.sizes:
            raise FileError(
                "has the configuration of a model, and no weights",
                where=str(place),
                remedy="Fetch its weights, or pass the folder of one part.",
            )
    return tuple(parts) if any(parts) else ()


def files_of(folder: Path, part: str) -> Found:
    """The files of one part: of the folder itself only those that are directly in it."""
    return find_files(folder / part, deep=bool(part))
