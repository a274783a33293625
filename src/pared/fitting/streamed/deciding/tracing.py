"""What each tensor could become, written to the disk as soon as it is known what errors of it cost."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from torch import nn

from pared.executors.executor import Executor, Task
from pared.fitting.calibration.gathering import pieces
from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.rounding import encoding, plan
from pared.fitting.rounding.importance import unreached
from pared.fitting.search.free.choices import cost_of, is_free, stats_or_even
from pared.fitting.search.free.offers import trace_unit
from pared.fitting.search.free.on_grids import trace_tensor
from pared.fitting.search.free.units import assigned
from pared.fitting.streamed.deciding.coding import CodedFile
from pared.fitting.streamed.deciding.spilled import Traced, bare, spill, write_traced
from pared.fitting.streamed.parts.weights import Weights
from pared.fitting.streamed.store import FIXED, Store
from pared.fitting.streamed.sweeps import Measured
from pared.model.contents import Decision, Stored
from pared.model.tensors import ModelTensor, ModelTensors
from pared.targets.alike import joined
from pared.targets.table import OWN, TARGETS
from pared.targets.target import Target

_ALONE: Final = 1 << 16  # numbers: tensors of at least this many are worth a task
# The memory that tracing takes: bytes as such; for each number of the tensors; for each byte of their moments.
_MEMORY: Final = 768 << 20
_OF_NUMBERS: Final = 10
_OF_MOMENTS: Final = 6


@dataclass(frozen=True, eq=False)
class Tracing:
    """Traces the tensors of one part after the other.

    Args:
        weights: those of the whole model, of which some are loaded at a time.
        conf: what is wanted.
        store: where everything is written.
    """

    weights: Weights
    conf: PostTrainingQuantConfig
    store: Store

    def __reduce__(self) -> tuple[object, ...]:
        return Tracing, (self.weights, self.conf, self.store)  # a target is found again where it is needed

    @cached_property
    def target(self) -> Target | None:
        """The runtime that is fitted for; None: pared itself."""
        # Whatever types the files have, tensors are loaded in float32, as in memory.
        return None if self.conf.target == OWN else TARGETS[self.conf.target].for_model("float16")

    def trace(self, part: str, names: Collection[str], measured: Measured, executor: Executor) -> None:
        """Write what the tensors of a part could become.

        Args:
            part: its name.
            names: the first names of its tensors.
            measured: what errors of them cost.
            executor: traces them, each large one in a task of its own.
        """
        groups = self._groups(names, _ALONE if executor.workers > 1 else pieces.LARGE)
        task = Task("tracing tensors", self.group, self._memory, on_device=True)
        parts = executor.map(task, [(tuple(group), measured.of(group)) for group in groups])
        found = sorted((one for some in parts for one in some), key=lambda one: self.weights.order[one.names[0]])
        write_traced(self.store.traced(part), found)

    def _memory(self, given: tuple[tuple[str, ...], Measured]) -> int:
        names, measured = given
        numbers = sum(one.tensor.numel() for one in self.weights.some(names))
        known = () if measured.sensitivity is None else measured.sensitivity.tensors.values()
        moments = sum(one.moments.nbytes for one in known if one.moments is not None)
        return _MEMORY + _OF_NUMBERS * numbers + _OF_MOMENTS * moments

    def group(self, given: tuple[tuple[str, ...], Measured]) -> list[Traced]:
        """What some tensors could become; what rounding them needs is written.

        Args:
            given: their first names, and what errors of them cost.
        """
        names, measured = given
        known = measured.sensitivity.tensors if measured.sensitivity is not None else {}
        with self.weights.loaded(names) as loaded:
            seen = measured.shown(loaded)
            found = list(self._on_grids(seen, known) if self.target is None else self._on_offers(seen, known))
        return [replace(one, free=None if one.free is None else bare(one.free)) for one in found]

    def _groups(self, names: Collection[str], large: int) -> list[list[str]]:
        """The names, in groups that are in memory together: where a runtime joins tensors, those are in one group."""
        joins = self.target is not None and any(joined(name, self.target.alike) for name in names)
        return [list(names)] if joins else self.weights.groups(names, large)

    def _on_offers(self, loaded: ModelTensors[nn.Module], known: Mapping[str, TensorStats]) -> Iterator[Traced]:
        """What is known of tensors that are loaded, on the grids of a runtime."""
        assert self.target is not None
        found = assigned(loaded, self.conf, self.target, self.weights.tensors)
        in_units = {tensor.name for unit in found.units for tensor in unit.tensors}
        for tensor, decision in zip(loaded, found.plan, strict=True):
            if tensor.name not in in_units:
                yield self._fixed(tensor, decision)
        for unit in found.units:
            names = tuple(tensor.name for tensor in unit.tensors)
            stats = {one.name: stats_or_even(one, known.get(one.name)) for one in unit.tensors}
            free = trace_unit(unit, stats, lambda one: unreached(one, known.get(one.name)))
            for name, target in zip(names, free.targets, strict=True):
                spill(self.store.target(name), target)
            yield Traced(names, tuple(cost_of(one, known.get(one.name)) for one in unit.tensors), free, None)

    def _fixed(self, tensor: ModelTensor, decision: Decision) -> Traced:
        """A tensor that nothing is to be chosen for; it is written, unless the constructor makes it."""
        if decision.treatment != "made":
            coded = encoding.encode(tensor, decision)
            stored = Stored(tensor.names, tensor.kind, coded, decision)
            CodedFile(self.store.coded(tensor.name, FIXED)).write(stored)
        return Traced((tensor.name,), (None,), None, decision)

    def _on_grids(self, loaded: ModelTensors[nn.Module], known: Mapping[str, TensorStats]) -> Iterator[Traced]:
        """What is known of tensors that are loaded."""
        conf, whole = self.conf, self.weights.tensors
        decisions = plan.make_plan(loaded, conf.rules, bits=None, strict=conf.strict, whole=whole)
        for tensor, decision in zip(loaded, decisions, strict=True):
            if not is_free(decision):
                yield self._fixed(tensor, decision)
                continue
            stats = known.get(tensor.name)
            free = trace_tensor(
                tensor,
                stats_or_even(tensor, stats),
                strict=conf.strict,
                fine=conf.quant_level == 0,
                because=unreached(tensor, stats),
            )
            spill(self.store.target(tensor.name), free.target)
            yield Traced((tensor.name,), (cost_of(tensor, stats),), free, None)
