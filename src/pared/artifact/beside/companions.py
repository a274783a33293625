"""The files beside the weights, copied so that a Hugging Face folder keeps its configuration and tokenizer.

Weights are never among them, whatever they are called; nor is anything that a link outside of the folder leads to.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pared.errors import FileError
from pared.files.directories.writable import writing_to
from pared.files.disk import open_file, write_atomic
from pared.files.magic import POINTER, kind_of
from pared.readers.folders.files import find_files
from pared.readers.folders.hub import is_within
from pared.readers.folders.names import is_index, is_stage, is_training, is_weights

log = logging.getLogger(__name__)

_OURS: Final = frozenset(("deploy.yaml", "engine.json"))
# What a file begins with that holds weights under any name, as `kind_of` calls it.
_KINDS: Final = frozenset(
    ("a .safetensors file", "a torch file", "a torch file as written before version 1.6", "a GGUF file",
     "an HDF5 file (Keras)")
)  # fmt: skip
_OUTSIDE: Final = "a link that leads out of the folder"
_IS_POINTER: Final = "a Git LFS pointer in the place of the file: run git lfs pull"


@dataclass(frozen=True)
class Companions:
    """The files of a folder beside its weights.

    Args:
        copied: those to copy, as sorted relative paths.
        left: why others are not copied, by relative path. Hidden files and files of our own are not mentioned.
    """

    copied: tuple[str, ...]
    left: Mapping[str, str]


def find_companions(folder: Path, output: Path, taken: Collection[str] = ()) -> Companions:
    """Find the files of a folder that are to be copied with it.

    Args:
        folder: the source. Links in it are followed to places inside it, and from a snapshot of Hugging Face's cache
            to that cache's blobs; all others are left, with a warning.
        output: a folder to skip, if it is inside `folder`.
        taken: the files whose weights were read.

    Raises:
        FileError: the folder cannot be read.
    """
    found = find_files(folder)
    copied, left = [], {}
    for name in _wanted([*found.sizes, *found.odd], folder, output):
        why = found.odd.get(name) or _why_not(folder, name, taken)
        if why is None:
            copied.append(name)
        elif why:
            left[name] = why
    for name, why in left.items():
        if why in (_OUTSIDE, _IS_POINTER):
            log.warning("%s is not copied: %s", folder / name, why)
    return Companions(tuple(_in_order(copied)), left)


def _wanted(names: Collection[str], folder: Path, output: Path) -> Iterator[str]:
    """The files that are not hidden, not ours, and not in the output; hidden folders hold caches and histories."""
    destination = os.path.realpath(output)
    inside = os.path.relpath(destination, os.path.realpath(folder)).replace(os.sep, "/") + "/"
    for name in names:
        hidden = any(part.startswith(".") for part in name.split("/"))
        if not hidden and not name.startswith(inside) and name.rpartition("/")[2] not in _OURS:
            yield name


def _in_order(names: Collection[str]) -> list[str]:
    """Sorted, the files of a folder before those of the folders in it."""
    return sorted(names, key=lambda name: (name.split("/")[:-1], name))


def _why_not(folder: Path, name: str, taken: Collection[str]) -> str | None:
    """Why a file is not copied; "" for weights that the result tells about; None if it is copied."""
    if not is_within(folder, name):
        return _OUTSIDE
    if is_training(name):
        return "only training needs it"
    if (name in taken and not name.endswith(".npy")) or is_index(name):
        return ""
    if is_stage(name):
        return "of a stage of the training"
    if is_weights(name):
        return "weights in another form"
    kind = _kind(folder / name)
    return _IS_POINTER if kind.encode() == POINTER else "weights under another name" if kind in _KINDS else None


def _kind(path: Path) -> str:
    """What kind of weights a file begins as; a pointer is called as it begins."""
    if path.stat().st_size == 0:
        return ""
    with open_file(path) as file:
        return POINTER.decode() if bytes(file.data[: len(POINTER)]) == POINTER else kind_of(file)


def copy(folder: Path, names: Collection[str], output: Path, within: Path) -> None:
    """Copy files, each completely or not at all.

    Raises:
        FileError: one cannot be read or written.
    """
    with writing_to(output):
        for name in names:
            with os.fdopen(_opened(folder / name), "rb") as source:
                write_atomic(output / name, lambda file, source=source: shutil.copyfileobj(source, file), within=within)  # type: ignore[misc]  # bound now


def _opened(path: Path) -> int:
    """A descriptor of a file that was found to be a regular one, and still is: opening a pipe would wait."""
    descriptor = os.open(
        os.path.realpath(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise FileError("has become something else than a file", where=str(path), remedy="Run the command again.")
