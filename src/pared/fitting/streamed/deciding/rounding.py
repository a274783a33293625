"""Rounding one tensor in one of its formats: a task that reads the checkpoint and the workspace, and writes a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pared.executors.executor import Executor, Task
from pared.fitting.rounding.targets import WEIGHTS_AT_ONCE
from pared.fitting.search.free.free import Free
from pared.fitting.streamed.deciding.coding import CodedFile
from pared.fitting.streamed.deciding.spilled import rounded_as, target_in
from pared.fitting.streamed.parts.weights import Weights
from pared.fitting.streamed.store import Store
from pared.model.contents import Decision, Stored

# The memory that rounding takes: bytes as such; for each number of the tensor; for each of those that are rounded
# together; for each byte of what it needs besides.
_MEMORY: Final = 512 << 20
_OF_NUMBERS: Final = 12
_OF_ROUNDED: Final = 24
_OF_FACTORS: Final = 2


@dataclass(frozen=True)
class Rounding:
    """A tensor, and what becomes of it.

    Args:
        name: its first name.
        free: its options, without tensors.
        option: that which was chosen.
        decision: what the artifact says about it.
    """

    name: str
    free: Free
    option: int
    decision: Decision


@dataclass(frozen=True, eq=False)
class Rounder:
    """Rounds tensors. It can be pickled.

    Args:
        weights: those of the whole model.
        store: where everything is.
    """

    weights: Weights
    store: Store

    def __call__(self, one: Rounding) -> None:
        """Round a tensor, and write it."""
        with self.weights.loaded([one.name]) as loaded:
            for tensor in loaded:
                target = target_in(self.store.target(one.name), tensor)
                coded = rounded_as(one.free, replace(tensor, view=target.view), target, one.option)
                stored = Stored(tensor.names, tensor.kind, coded, one.decision)
                CodedFile(self.store.coded(one.name, one.option)).write(stored)

    def memory(self, one: Rounding) -> int:
        """The bytes of memory that it takes."""
        (tensor,) = self.weights.some([one.name])
        factors = self.store.target(one.name).stat().st_size
        numbers = tensor.tensor.numel()
        return _MEMORY + _OF_NUMBERS * numbers + _OF_ROUNDED * min(numbers, WEIGHTS_AT_ONCE) + _OF_FACTORS * factors

    def all(self, wanted: Sequence[Rounding], executor: Executor) -> Iterator[Rounding]:
        """Round tensors; gives each that is done, in order."""
        task = Task("rounding a tensor", self, self.memory, on_device=True)
        for one, _ in zip(wanted, executor.map(task, wanted), strict=True):
            yield one
