"""The two sweeps: forward, what enters each block; backward, what errors of each block's tensors cost the output.

The numbers are those that `calibration/sensitivity` finds with the whole model in memory: the same random directions of
the output, carried back through one block at a time. Hidden states are rounded as they are written, so that a run that
computes them again finds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pared.executors.executor import Executor, LocalExecutor, Task
from pared.fitting.calibration.gathering.gradients import Gathering, Sums
from pared.fitting.calibration.sensitivity import Probes, Sensitivity, is_unseen, probes_of, rounds_for, sensitivity_of
from pared.fitting.calibration.watch import ProductWatch
from pared.fitting.experts.balancing import balanced
from pared.fitting.inputs.moments import finite, moments_of, with_inputs
from pared.fitting.streamed.parts.blocks import ModelBlocks, differentiated, of_batch
from pared.fitting.streamed.parts.chain import Arguments, Chain, Middle
from pared.fitting.streamed.parts.weights import Weights
from pared.fitting.streamed.shards.runs import KINDS, BlockRuns, Shards, added
from pared.fitting.streamed.store import Store
from pared.formats.views import View
from pared.model.calls import Call, explaining, guarded
from pared.model.outputs import Key, Leaf, leaves_of
from pared.model.tensors import ModelTensors
from pared.switches import ignoring

ResultT = TypeVar("ResultT")


class _Carried(torch.autograd.Function):
    """What leaves the last block as a function of what enters the first, whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, _entering: Tensor, leaving: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return leaving.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None, None


@dataclass(frozen=True, eq=False)
class Measured:
    """What the sweeps found of the tensors of one part.

    Args:
        sensitivity: what errors of them cost; None if no gradient leads to any.
        views: the view of each tensor by its first name, and the groups of its rows, as products use them.
    """

    sensitivity: Sensitivity | None
    views: Mapping[str, tuple[View, int | None]] = field(default_factory=dict)

    def of(self, names: Collection[str]) -> Measured:
        """What concerns some of the tensors."""
        if self.sensitivity is None:
            return self
        known = {name: one for name, one in self.sensitivity.tensors.items() if name in names}
        return Measured(Sensitivity(known), {name: one for name, one in self.views.items() if name in names})

    def shown(self, tensors: ModelTensors[nn.Module]) -> ModelTensors[nn.Module]:
        """Tensors with the views that their products showed."""
        views = {one.name: self.views.get(one.name, (one.view, one.groups)) for one in tensors}
        found = (replace(one, view=views[one.name][0], groups=views[one.name][1]) for one in tensors)
        return replace(tensors, tensors=tuple(found))


@dataclass(eq=False)
class Sweeps:
    """What the sweeps go over.

    Args:
        weights: the model.
        blocks: how it is divided.
        calls: those of calibration.
        store: where everything is written.
        seed: where the random directions start.
        logits: finds the paths of outputs that hold logits.
        dtype: the type of the hidden states on the disk, "bfloat16" or "float32".
        every: what enters each block is kept for one in this many blocks, and computed again for the others.
        inputs: whether second moments of the inputs of weights are wanted, too.
        executor: runs the blocks.
        runs: what it runs, known after `start`.
    """

    weights: Weights
    blocks: ModelBlocks
    calls: Sequence[Call]
    store: Store
    seed: int
    logits: Callable[[nn.Module, list[Leaf]], frozenset[str]]
    dtype: str = "bfloat16"
    every: int = 1
    inputs: bool = False
    executor: Executor = field(default_factory=LocalExecutor)
    runs: BlockRuns = field(init=False)

    def __post_init__(self) -> None:
        self._chain = Chain(self.weights.tensors.model, self.blocks)
        self.rounds = rounds_for(len(self.calls))

    @property
    def states_nbytes(self) -> int:
        """The size of what enters a block in all calls."""
        return sum(self.runs.states(shard).nbytes for shard in self._shards)

    @property
    def gradients_nbytes(self) -> int:
        """The size of the gradients of this."""
        return sum(self.runs.gradients(shard).nbytes for shard in self._shards)

    @property
    def _shards(self) -> range:
        return range(len(self.runs.shards))

    def start(self) -> None:
        """Find out what the blocks get beside hidden states, and the shapes of these.

        Raises:
            CalibrationError: the model raises something on a batch.
            NotInBlocks: the model does not pass a stream through its blocks.
        """
        with self.weights.around({*self.blocks.outside, *self.blocks.tensors[0]}):
            first = self.calls[0]
            with explaining(self.weights.tensors.model, (first.args, dict(first.kwargs)), of_batch(0)):
                guarded(partial(self._chain.learn, first), of_batch(0))
        shapes: list[tuple[int, ...]] = []
        found: list[Arguments] = []
        with self.weights.around(self.blocks.outside, traced=True):
            for number, call in enumerate(self.calls):
                hidden, arguments = guarded(partial(self._chain.start, call), of_batch(number))
                shapes.append(tuple(hidden.shape))
                found.append(arguments)
        where = self.weights, self.blocks, self._chain, self.store
        self.runs = BlockRuns(*where, found, tuple(shapes), self.dtype, self.inputs)

    def enter(self) -> None:
        """Write what enters the first block, of one call after the other."""
        missing = self._missing(0)
        if not missing:
            return
        with self.weights.around(self.blocks.outside):
            for shard in missing:
                entering = (self._entering(number) for number in self.runs.shards[shard])
                self.runs.states(shard).write(self.store.entering(0, shard), entering)

    def _entering(self, number: int) -> Tensor:
        return guarded(partial(self._chain.entering, self.calls[number]), of_batch(number))

    def forward(self, number: int) -> None:
        """Write what leaves a block."""
        if all(self._missing(later) for later in range(number + 1, len(self.blocks) + 1)):
            self._advance(number)
            if number % self.every:
                self.forget_state(number)

    def forget_state(self, number: int) -> None:
        """Delete what enters a block."""
        self.store.forget([self.store.entering(number, shard) for shard in self._shards])

    def forget_gradient(self, number: int) -> None:
        """Delete the gradients of what enters a block."""
        self.store.forget([self.store.gradient(number, shard) for shard in self._shards])

    def _missing(self, number: int) -> list[int]:
        """The shards of which what enters this block is not there."""
        return [shard for shard in self._shards if not self.store.entering(number, shard).is_file()]

    def _advance(self, number: int) -> None:
        task = Task("running a block", self.runs.forward, self.runs.memory, on_device=True)
        for _ in self.executor.map(task, self._divided(number, self._missing(number + 1))):
            continue  # what it found is in the workspace

    def _divided(self, number: int, shards: Sequence[int]) -> list[Shards]:
        """Inputs of tasks: one for each shard, unless one task would do all of them anyway."""
        if self.executor.workers == 1:
            return [(number, tuple(shards))]
        return [(number, (shard,)) for shard in shards]

    def top(self) -> None:
        """Write the gradients of what leaves the last block, along random directions of the output."""
        last = len(self.blocks)
        if self.store.noted("top") is not None:
            return
        with self.weights.around(self.blocks.outside) as tensors:
            for tensor in tensors:
                tensor.tensor.requires_grad_(False)
            with torch.no_grad(), ignoring():
                energies = self._energies()
            gradients = self._from_output(energies)
            for shard, own in enumerate(self.runs.shards):
                some = islice(gradients, self.rounds * len(own))
                self.runs.gradients(shard).write(self.store.gradient(last, shard), some)
        keys = [[*key, energy] for key, energy in energies.items()]
        self.store.note("top", {"energies": keys, "judged": self._judged})

    def _energies(self) -> dict[Key, float]:
        """The energy of each output, summed over all calls."""
        totals: dict[Key, float] = {}
        logits: frozenset[str] | None = None
        for number, leaving in enumerate(self.runs.entering(len(self.blocks))):
            call = self.calls[number]
            output = self._around(number, leaving)
            if logits is None:
                logits = self.logits(self.weights.tensors.model, leaves_of(output, (), call.task))
            for leaf in leaves_of(output, logits, call.task):
                totals[leaf.key] = totals.get(leaf.key, 0.0) + leaf.energy()
        return totals

    def _around(self, number: int, leaving: Tensor) -> Any:
        """The output of a call, by what leaves the last block in it."""
        return guarded(partial(self._chain.around, self.calls[number], _instead(leaving)), of_batch(number))

    def _from_output(self, energies: Mapping[Key, float]) -> Iterator[Tensor]:
        """The gradient of what leaves the last block, of each turn and call."""
        generator, self._judged = torch.Generator().manual_seed(self.seed), True
        for turn in range(self.rounds):
            for number, leaving in enumerate(self.runs.entering(len(self.blocks))):
                yield self._differentiated(number, partial(self._of_leaving, leaving, energies, generator, turn))

    def _of_leaving(
        self, leaving: Tensor, energies: Mapping[Key, float], generator: torch.Generator, turn: int, call: Call
    ) -> Tensor:
        """The gradient of what leaves the last block in a call, along a random direction of its output."""
        leaving.requires_grad_(True)
        with torch.enable_grad(), ignoring(), ProductWatch({}, _ignore, through=True):
            leaves = self._leaves(call, _instead(leaving), energies)
        found = self._drawn(leaves, energies, generator, turn)
        del leaves
        self._judged = self._judged and found.judged
        (gradient,) = torch.autograd.grad(found.outputs, [leaving], found.directions)
        return gradient

    def _differentiated(self, number: int, take: Callable[[Call], ResultT]) -> ResultT:
        """What a function returns that takes gradients of a call."""
        return differentiated(partial(take, self.calls[number]), of_batch(number), self.weights.tensors.model)

    def _leaves(self, call: Call, middle: Middle, energies: Mapping[Key, float]) -> list[Leaf]:
        logits = {path for path, is_logits, _ in energies if is_logits}
        return leaves_of(self._chain.around(call, middle), logits, call.task)

    def _drawn(
        self, leaves: list[Leaf], energies: Mapping[Key, float], generator: torch.Generator, turn: int
    ) -> Probes:
        return probes_of(leaves, energies, self.rounds, generator, None if len(self.calls) > 1 else turn % 2)

    def backward(self, number: int) -> Measured:
        """What errors of a block's tensors cost; writes the gradients of what enters it.

        Args:
            number: that of the block.
        """
        self._computed_again(number)
        task = Task("measuring a block", self.runs.backward, self.runs.memory, on_device=True)
        swept = added(self.executor.map(task, self._divided(number, self._shards)))
        found = self._sensitivity(swept.totals.sums(swept.layouts, self.rounds))
        if found is not None:
            counts = {name: one / self.rounds for name, one in swept.tokens.items()}
            own = tuple(self.weights.some(self.blocks.tensors[number]))
            shown = Measured(found, swept.views).shown(replace(self.weights.tensors, tensors=own))
            found = with_inputs(balanced(found, shown, self.runs.experts(number), counts), finite(swept.inputs))
        return Measured(found, swept.views)

    def outside(self) -> Measured:
        """What errors of everything around the blocks cost."""
        energies = {(path, is_logits, task): energy for path, is_logits, task, energy in self._top["energies"]}
        generator = torch.Generator().manual_seed(self.seed)
        gradients = self.runs.entering_gradients(0)
        with self.weights.around(self.blocks.outside) as tensors, torch.enable_grad(), ignoring():
            last = len(self.blocks)
            runs = (partial(self._around, number, leaving) for number, leaving in enumerate(self.runs.entering(last)))
            moments = moments_of(tensors, runs) if self.inputs else {}
            gathering = Gathering(tensors, KINDS)
            for turn in range(self.rounds):
                for number, leaving in enumerate(self.runs.entering(last)):
                    unseen = is_unseen(len(self.calls), turn, number)
                    middle = _carried(leaving, next(gradients))
                    take = partial(self._gather, gathering, middle, energies, generator, turn, unseen)
                    self._differentiated(number, take)
        measured = self._sensitivity(gathering.sums(self.rounds))
        return Measured(None if measured is None else with_inputs(measured, finite(moments)))

    def _gather(
        self,
        gathering: Gathering,
        middle: Middle,
        energies: Mapping[Key, float],
        generator: torch.Generator,
        turn: int,
        unseen: bool,
        call: Call,
    ) -> None:
        """Take the gradients of what is around the blocks in a call, along a random direction of its output."""
        leaves = gathering.watched(partial(self._leaves, call, middle, energies))
        found = self._drawn(leaves, energies, generator, turn)
        del leaves
        gathering.along(found.outputs, found.directions, unseen=unseen)

    @property
    def _top(self) -> dict[str, Any]:
        found = self.store.noted("top")
        assert found is not None
        return found

    def _sensitivity(self, sums: Sums) -> Sensitivity | None:
        return sensitivity_of(sums, judged=bool(self._top["judged"]))

    def _computed_again(self, number: int) -> None:
        """Make sure that what enters a block is there."""
        start = number
        while self._missing(start):
            start -= 1
        for again in range(start, number):
            self._advance(again)


def _instead(leaving: Tensor) -> Middle:
    return lambda _: leaving


def _carried(leaving: Tensor, gradient: Tensor) -> Middle:
    def middle(entering: Tensor) -> Tensor:
        left: Tensor = _Carried.apply(entering, leaving, gradient)  # type: ignore[no-untyped-call]  # as torch has it
        return left

    return middle


def _ignore(_: object) -> None:
    """What is watched only for its gradients."""
