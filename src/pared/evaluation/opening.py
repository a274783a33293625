"""Models that are given as folders: of transformers, or with an artifact of pared and config.json beside it."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch
from torch import nn

from pared.artifact.envelope import artifact_in
from pared.errors import ConfigError
from pared.files.disk import reading
from pared.files.remote.urls import source_at
from pared.fitting.hugging_face.loading import architecture_in, model_in, numbers_in
from pared.fitting.hugging_face.memory import available
from pared.runtime.load import load
from pared.runtime.placement import Memory

log = logging.getLogger(__name__)

_SHARE: Final = 0.5  # of the memory that is left, for models in float32
_FLOAT: Final = 4  # bytes
_HALF: Final = 2
_READ: Final = 2  # bytes that are in use for each one of an artifact that stays in codes


@dataclass(frozen=True)
class FolderModel:
    """A model in a folder. It can be pickled: another process opens the folder itself, and keeps the model open.

    Args:
        folder: its absolute path.
        fits: whether float32 fits in memory; otherwise floats are in bfloat16, and an artifact keeps its codes.
        numbers: how many its weights are.
        files: the name, size and time of each file: an opened model is that of these files.
    """

    folder: Path
    fits: bool
    numbers: int
    files: tuple[tuple[str, int, int], ...]

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.folder / name for name, _, _ in self.files]

    @property
    def memory(self) -> int:
        """See `Opener`."""
        if self.fits:
            return _FLOAT * self.numbers
        if artifact_in(self.folder).is_file():
            return _READ * artifact_in(self.folder).stat().st_size
        return _HALF * self.numbers

    def __call__(self) -> AbstractContextManager[nn.Module]:
        """See `Opener`."""
        return nullcontext(_kept_open(self))

    def opened(self) -> nn.Module:
        """The model."""
        if artifact_in(self.folder).is_file():
            memory: Memory = "fast" if self.fits else "small"
            return load(self.folder, architecture_in(self.folder), memory=memory, warm=False, quiet=True)
        return model_in(self.folder, torch.float32 if self.fits else torch.bfloat16)


@lru_cache(maxsize=2)  # a worker does many tasks about one model and its reference
def _kept_open(model: FolderModel) -> nn.Module:
    return model.opened()


def found(given: nn.Module | str | os.PathLike[str], argument: str, others: int = 0) -> FolderModel | None:
    """The model of a folder, which is not opened yet; None if a model was given itself.

    Weights are in float32 if they take at most half of the memory that is left that way. Otherwise floats are read in
    bfloat16, an artifact keeps its codes, and the log says so.

    Args:
        given: a model, or a folder.
        argument: the name of the argument, for messages.
        others: how many models of the same size are in memory as well.

    Raises:
        ConfigError: it is neither, or the architecture is not in transformers.
        FileError: the folder cannot be read.
    """
    if isinstance(given, nn.Module):
        return None
    folder = source_at(given, f"pared.evaluate({argument}=...)")
    if not folder.is_dir():
        raise ConfigError(
            f"{argument} is neither a model nor a folder",
            where=str(folder),
            remedy="Pass a model, a Hugging Face folder, or one that `pared fit` wrote from such a folder.",
        )
    numbers = numbers_in(folder)
    free, nbytes = available(), _FLOAT * numbers
    fits = free is None or (1 + others) * nbytes <= _SHARE * free
    if not fits:
        how = "its weights stay in codes" if artifact_in(folder).is_file() else "it is read in bfloat16"
        log.warning("%s: %.1f GB in float32 are more than there is room for: %s", folder, nbytes / 1e9, how)
    with reading(folder):
        stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    files = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    return FolderModel(folder.absolute(), fits, numbers, files)


def opened(given: nn.Module | str | os.PathLike[str], argument: str, others: int = 0) -> tuple[nn.Module, Path | None]:
    """The model, and the folder that it came from; None if it was given itself.

    Args and errors are those of `found`.
    """
    model = found(given, argument, others)
    if model is None:
        assert isinstance(given, nn.Module)
        return given, None
    return model.opened(), model.folder
