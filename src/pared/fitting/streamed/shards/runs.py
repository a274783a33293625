"""A block over a shard of the calls: what leaves it, or what errors of its tensors cost in these calls.

Sums over shards are always added in the order of the shards: so the number of workers makes no difference to any bit.
How calls are divided follows from their number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain as chained
from typing import Final

import torch
from torch import Tensor, nn

from pared.fitting.calibration.blocks import Blocks, add_up, blocks_of
from pared.fitting.calibration.gathering.gradients import Gathering, Totals
from pared.fitting.calibration.orientation import oriented_by
from pared.fitting.calibration.sensitivity import is_unseen, rounds_for
from pared.fitting.experts.counting import counting
from pared.fitting.experts.finding import Mixture, mixtures
from pared.fitting.inputs import moments
from pared.fitting.streamed.parts.blocks import ModelBlocks, differentiated, not_in_blocks, of_batch
from pared.fitting.streamed.parts.chain import Arguments, Chain
from pared.fitting.streamed.parts.weights import Weights
from pared.fitting.streamed.store import Store, Streams
from pared.formats.views import View
from pared.model.calls import guarded
from pared.model.tensors import ModelTensors
from pared.switches import device, ignoring

KINDS: Final = ("parameter", "buffer")

_FEWEST: Final = 4  # calls of a shard: each loads the block
_MOST: Final = 16  # shards: each has second moments of its own, as large as the block or larger
_FLOAT: Final = 4
# Of a token's hidden states: how much of them may differ when a block runs again. The disk's rounding loses half of it.
_SAME: Final = torch.finfo(torch.bfloat16).eps
# The memory that a block takes: bytes as such; times its weights in float32, with their gradients; times its moments,
# of all calls, of the unseen ones, of inputs, and while they are sent.
_MEMORY: Final = 512 << 20
_OF_WEIGHTS: Final = 3
_OF_MOMENTS: Final = 5

Shards = tuple[int, tuple[int, ...]]  # a block's number, and the numbers of shards


def shards_of(calls: int) -> tuple[range, ...]:
    """How calls are divided; those that are probed in several turns are not.

    >>> shards_of(10), shards_of(11)
    ((range(0, 10),), (range(0, 5), range(5, 11)))
    """
    count = 1 if rounds_for(calls) > 1 else max(1, min(_MOST, calls // _FEWEST))
    return tuple(range(calls * i // count, calls * (i + 1) // count) for i in range(count))


@dataclass(frozen=True, eq=False)
class Swept:
    """What some calls show of a block.

    Args:
        totals: sums of what gradients show.
        layouts: how the blocks of moments cover each weight's matrix, by first names.
        views: the view of each tensor, and the groups of its rows, as products use them.
        tokens: how many tokens each expert got, by the name of the module that holds them.
        inputs: second moments of the inputs of weights, by first names; none where nobody wants them.
    """

    totals: Totals
    layouts: Mapping[str, Blocks]
    views: Mapping[str, tuple[View, int | None]]
    tokens: dict[str, Tensor]
    inputs: dict[str, Tensor]

    def add(self, more: Swept) -> None:
        """Add what other calls show."""
        self.totals.add(more.totals)
        self.inputs.update(moments.added(self.inputs, more.inputs))
        for name, counts in more.tokens.items():
            add_up(self.tokens, name, counts)


def added(parts: Iterable[Swept]) -> Swept:
    """What all of them show, added in their order; the first is written to."""
    each = iter(parts)
    found = next(each)
    for more in each:
        found.add(more)
    return found


@dataclass(frozen=True, eq=False)
class BlockRuns:
    """Runs blocks. It can be pickled: a worker opens the folder's files itself.

    Args:
        weights: those of the model, of which some are loaded at a time.
        blocks: how it is divided.
        chain: its blocks on their own.
        store: where hidden states and gradients are.
        arguments: what the blocks get in each call beside hidden states.
        shapes: those of each call's hidden states.
        dtype: the type of the hidden states on the disk.
        inputs: whether second moments of the inputs of weights are wanted, too.
    """

    weights: Weights
    blocks: ModelBlocks
    chain: Chain
    store: Store
    arguments: Sequence[Arguments]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    inputs: bool = False

    @cached_property
    def shards(self) -> tuple[range, ...]:
        """The calls of each shard."""
        return shards_of(len(self.shapes))

    @cached_property
    def rounds(self) -> int:
        """How often each call is probed."""
        return rounds_for(len(self.shapes))

    @cached_property
    def _experts(self) -> Mapping[int, list[Mixture]]:
        """The mixtures, by the block that holds all of their tensors."""
        places = {name: number for number, names in enumerate(self.blocks.tensors) for name in names}
        found: dict[int, list[Mixture]] = {}
        for one in mixtures(self.weights.tensors):
            holders = {places.get(name) for kind in one.tensors for name in kind}
            if len(holders) == 1 and (holder := holders.pop()) is not None:
                found.setdefault(holder, []).append(one)
        return found

    def experts(self, number: int) -> list[Mixture]:
        """The mixtures in a block."""
        return self._experts.get(number, [])

    def states(self, shard: int) -> Streams:
        """How the hidden states of a shard are written."""
        return Streams(tuple(self.shapes[i] for i in self.shards[shard]), self.dtype)

    def gradients(self, shard: int) -> Streams:
        """How their gradients are written: nothing is lost, since only two files of them are ever there."""
        return Streams(self.states(shard).shapes, "float32", self.rounds)

    def entering(self, number: int) -> Iterator[Tensor]:
        """What enters a block in all calls."""
        return chained.from_iterable(
            self.states(shard).read(self.store.entering(number, shard)) for shard in range(len(self.shards))
        )

    def entering_gradients(self, number: int) -> Iterator[Tensor]:
        """The gradients of what enters a block, of each turn and call."""
        return chained.from_iterable(
            self.gradients(shard).read(self.store.gradient(number, shard)) for shard in range(len(self.shards))
        )

    def memory(self, shards: Shards) -> int:
        """The bytes of memory that either sweep takes for a block."""
        own = self.weights.some(self.blocks.tensors[shards[0]])
        moments = 0
        for tensor in own:
            if tensor.weight_like:
                layout = blocks_of(tensor)
                moments += (
                    layout.groups * layout.column_blocks * (-(-tensor.view.n_columns // layout.column_blocks)) ** 2
                )
        weights = sum(one.tensor.numel() for one in own)
        return _MEMORY + _FLOAT * (_OF_WEIGHTS * weights + _OF_MOMENTS * moments)

    def forward(self, shards: Shards) -> None:
        """Write what leaves a block in the calls of some shards."""
        number, some = shards
        with self.weights.loaded(self.blocks.tensors[number], device()), torch.no_grad(), ignoring():
            for shard in some:
                left = (run() for run in self._each(number, [shard]))
                self.states(shard).write(self.store.entering(number + 1, shard), left)

    def backward(self, shards: Shards) -> Swept:
        """What errors of a block's tensors cost in the calls of some shards; writes the gradients of what enters it."""
        number, some = shards
        with self.weights.loaded(self.blocks.tensors[number], device()) as loaded:
            tensors = oriented_by(loaded, self._each(number, range(len(self.shards))))
            return added(self._swept(number, shard, tensors) for shard in some)

    def _swept(self, number: int, shard: int, tensors: ModelTensors[nn.Module]) -> Swept:
        inputs = moments.moments_of(tensors, self._each(number, [shard])) if self.inputs else {}
        gathering = Gathering(tensors, KINDS)
        with counting(tensors.model, self.experts(number)) as tokens:
            gradients = self._through(number, shard, gathering)
            self.gradients(shard).write(self.store.gradient(number, shard), gradients)
        views = {one.name: (one.view, one.groups) for one in tensors}
        return Swept(gathering.totals.here(), gathering.layouts, views, dict(tokens), moments.here(inputs))

    def _each(self, number: int, shards: Iterable[int]) -> Iterator[Callable[[], Tensor]]:
        """Functions that run a block, which is loaded, as each call of some shards does."""
        for shard in shards:
            states = self.states(shard).read(self.store.entering(number, shard))
            for i, hidden in zip(self.shards[shard], states, strict=True):
                run = partial(self.chain.block, number, hidden.to(device()), self.arguments[i])
                yield partial(guarded, run, of_batch(i, number))

    def _through(self, number: int, shard: int, gathering: Gathering) -> Iterator[Tensor]:
        """The gradient of what enters a block, of each turn and call of a shard."""
        gradients = self.gradients(shard).read(self.store.gradient(number + 1, shard))
        leaving: Tensor | None = next(self.states(shard).read(self.store.entering(number + 1, shard)))
        for turn in range(self.rounds):
            states = self.states(shard).read(self.store.entering(number, shard))
            for i, entering in zip(self.shards[shard], states, strict=True):
                unseen = is_unseen(len(self.shapes), turn, i)
                take = partial(self._gradient, number, i, entering, next(gradients), gathering, unseen, leaving)
                yield differentiated(take, of_batch(i, number), self.weights.tensors.model)
                leaving = None  # once is enough

    def _gradient(
        self,
        number: int,
        call: int,
        entering: Tensor,
        direction: Tensor,
        gathering: Gathering,
        unseen: bool,
        leaving: Tensor | None,
    ) -> Tensor:
        """The gradient of what enters a block in a call.

        Args:
            number: that of the block.
            call: that of the call.
            entering: what enters.
            direction: the gradient of what leaves.
            gathering: gets the gradients of weights.
            unseen: see `Gathering.along`.
            leaving: what left in the forward sweep; None: that is not compared.
        """
        entering, direction = entering.to(device()).requires_grad_(True), direction.to(device())
        with torch.enable_grad(), ignoring():
            left = gathering.watched(partial(self.chain.block, number, entering, self.arguments[call]))
            if leaving is not None:
                self._check_same(number, left.detach(), leaving)
            (gradient,) = gathering.along([left], [direction], unseen=unseen, also=[entering])
        return torch.zeros_like(entering) if gradient is None else gradient

    def _check_same(self, number: int, left: Tensor, before: Tensor) -> None:
        """Refuse a block that gives something else when it runs again.

        It is enough that most tokens are the same: where experts score alike, rounding decides which ones a token gets.
        """
        before = before.to(left.device)
        differences = (left.float() - before).norm(dim=-1) / before.norm(dim=-1)
        if float(differences.nanmedian()) > _SAME:
            raise not_in_blocks(
                f"block {number} does not give the same twice: it is random (dropout), or keeps what it was given",
                self.weights.tensors.model,
            )

    def __reduce__(self) -> tuple[object, ...]:
        rest = (self.store, self.arguments, self.shapes, self.dtype, self.inputs)
        return _received, (self.weights, self.blocks, self.chain.rest, *rest)


def _received(weights: Weights, blocks: ModelBlocks, rest: tuple[object, ...] | None, *others: object) -> BlockRuns:
    chain = Chain(weights.tensors.model, blocks)
    chain.rest = rest
    return BlockRuns(weights, blocks, chain, *others)  # type: ignore[arg-type]  # as they were sent
