"""How workers open the models of a search: the float one and those for other runtimes by block, artifacts in codes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from pared.fitting.streamed.deciding.coding import CodedFile
from pared.fitting.streamed.parts.blocks import ModelBlocks
from pared.fitting.streamed.parts.running import running
from pared.fitting.streamed.parts.weights import Weights
from pared.fitting.streamed.store import FIXED, Store
from pared.runtime.load import load

_FLOAT: Final = 4  # bytes
_READ: Final = 2  # bytes that are in use for each one of an artifact


@dataclass(frozen=True)
class CodedNumbers:
    """The numbers of tensors that an artifact would have, by their first names.

    Args:
        store: where the tensors are.
        formats: the option of each tensor whose format is free.
    """

    store: Store
    formats: dict[str, int]

    def __call__(self, name: str) -> Tensor:
        """Decode them."""
        numbers = CodedFile(self.store.coded(name, self.formats.get(name, FIXED))).decoded()
        return torch.from_numpy(np.array(numbers, copy=True))


@dataclass(frozen=True)
class ByBlock:
    """A model of which one block at a time is in memory.

    Args:
        weights: those of the float model.
        blocks: how it is divided.
        instead: gives other numbers of each tensor; None: those of the float model.
    """

    weights: Weights
    blocks: ModelBlocks
    instead: Callable[[str], Tensor] | None = None

    @property
    def memory(self) -> int:
        """See `Opener`."""
        sizes = {one.name: one.tensor.numel() for one in self.weights.tensors}
        largest = max(sum(sizes[name] for name in names) for names in self.blocks.tensors)
        return _FLOAT * (2 * largest + sum(sizes[name] for name in self.blocks.outside))

    def __call__(self) -> AbstractContextManager[nn.Module]:
        """See `Opener`."""
        weights = self.weights if self.instead is None else replace(self.weights, instead=self.instead)
        return running(weights, self.blocks)


@dataclass(frozen=True)
class Loaded:
    """An artifact, whose weights stay in codes; a process keeps the last one that it opened.

    Args:
        path: the file, of a name that no other artifact had.
        nbytes: its size.
        weights: the architecture.
    """

    path: Path
    nbytes: int
    weights: Weights

    @property
    def memory(self) -> int:
        """See `Opener`."""
        return _READ * self.nbytes + _FLOAT * max(one.tensor.numel() for one in self.weights.tensors)

    def __call__(self) -> AbstractContextManager[nn.Module]:
        """See `Opener`."""
        return nullcontext(_kept_open(self))

    def opened(self) -> nn.Module:
        """The model."""
        return load(self.path, self.weights.tensors.model, memory="small", warm=False, quiet=True)


@lru_cache(maxsize=1)
def _kept_open(artifact: Loaded) -> nn.Module:
    return artifact.opened()
