"""What errors cost: how much noise in each weight and in each layer's input damages the model's output.

One pass of gradients over recorded calls. For a random direction r of the outputs with `E[r r^T] = I`, the gradient of
`r . y` by a weight has a mean square that is the energy which an error of that weight puts into the output (Hutchinson
1990). Neither labels nor a loss function are needed. The same pass gathers the second moments of
every layer's inputs, each sample weighted by how much the output depends on it, for rounding with error feedback.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from pared.errors import reason_of
from pared.fitting.calibration.blocks import Blocks
from pared.fitting.calibration.gathering.gradients import Gathering, Sums
from pared.fitting.calibration.gathering.noise import LEVELS
from pared.fitting.calibration.watch import Product, ProductWatch
from pared.formats.activation import Activation
from pared.model.calls import Call
from pared.model.copies import shadow
from pared.model.outputs import Key, Leaf, leaves_of, share_of_each
from pared.model.tensors import ModelTensors
from pared.switches import ignoring

log = logging.getLogger(__name__)

# Recorded calls are probed in turn until there are about this many probes; each call at least once.
_PROBES: Final = 16

# How gradients are taken: first through where the model cuts them off, which fails where it then writes into a weight.
# A buffer that the forward writes into cannot have a gradient.
_ATTEMPTS: Final = ((True, ("parameter", "buffer")), (False, ("parameter", "buffer")), (False, ("parameter",)))


@dataclass(frozen=True, eq=False)
class TensorStats:
    """What calibration tells about one weight.

    Args:
        rows: float64 (rows of the view,): the damage if each element of the row had an independent error of variance 1.
        moments: float32 (blocks, columns, columns): second moments of the weight's gradients, in which each input
            counts by how much the output depends on it; None for embedding tables and where not measured.
        unseen: the part of `moments` from every other call, or from every other sample of a single call; it judges what
            was made from the rest. None: there is no such part. Blocks that it did not reach are those of `moments`.
        layout: how the blocks cover the weight's matrix.
        inputs: second moments of the inputs themselves, likewise; None where they were not measured.
        tokens: float64 (experts,): how many tokens each expert of a stack, or this one alone, got; None for others.
        uses: float64 (rows,): how often each row of an embedding table was looked up; None for other weights.
    """

    rows: Tensor
    moments: Tensor | None = None
    unseen: Tensor | None = None
    layout: Blocks = field(default_factory=Blocks)
    uses: Tensor | None = None
    inputs: Tensor | None = None
    tokens: Tensor | None = None

    @property
    def judge(self) -> Tensor | None:
        """The moments that errors are measured with: the unseen ones if there are any."""
        return self.moments if self.unseen is None else self.unseen


@dataclass(frozen=True)
class InputNoise:
    """What noise in one layer's input costs.

    Args:
        total: the damage if each number of the input had an independent error of variance 1.
        dynamic: the damage of rounding each row of the input to 8 bits in its own range.
    """

    total: float
    dynamic: float

    def cost(self, activation: Activation) -> float:
        """The damage of rounding the input like this; a static range and its outliers hold all that calibration saw."""
        if activation.mode == "static":
            step = (activation.high - activation.low) / LEVELS
            return self.total * step**2 / 12 if step else self.dynamic  # zeros alone are exact either way
        return self.dynamic

    def __add__(self, other: InputNoise) -> InputNoise:
        """The cost of both, which are independent."""
        return InputNoise(self.total + other.total, self.dynamic + other.dynamic)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What errors cost: in each tensor, and in the input that it is multiplied with; both by its first name."""

    tensors: Mapping[str, TensorStats]
    inputs: Mapping[str, InputNoise] = field(default_factory=dict)

    def corrected(self, tensors: ModelTensors[nn.Module], factors: Mapping[str, float]) -> Sensitivity:
        """The same where errors in some tensors cost more, by their first names; 1 in those without a known cost."""
        known = dict(self.tensors)
        for tensor in tensors:
            if tensor.name in factors:
                stats = known.get(tensor.name)
                if stats is None or not bool((stats.rows > 0).any()):  # no factor would change zeros
                    rows = tensor.view.n_rows
                    stats = TensorStats(torch.full((rows,), 1.0 / rows, dtype=torch.float64))
                known[tensor.name] = replace(stats, rows=stats.rows * factors[tensor.name])
        return replace(self, tensors=known)


def measure(
    tensors: ModelTensors[nn.Module],
    calls: Sequence[Call],
    energies: Mapping[Key, float],
    seed: int,
    *,
    rounds: int | None = None,
) -> Sensitivity | None:
    """Measure what errors cost, by gradients along random directions of the outputs of the recorded calls.

    Args:
        tensors: those of the model, which is left as it is.
        calls: the calls of calibration, which are repeated.
        energies: the energy of each floating output, summed over all calls, and as logits of those that count as
            logits, too; empty if there are no floating outputs.
        seed: seeds the random directions.
        rounds: how often each call is probed, without second moments, which rounding without feedback does not need.
            None: until there are about 16 probes, with second moments.

    Returns:
        None if nothing can be differentiated: no gradient leads from the outputs to the weights, or taking one fails,
        as where the model's own code overwrites a tensor that the gradient needs.
    """
    if not any(tensor.fits_grid for tensor in tensors):
        return Sensitivity({})
    failed: Exception | None = None
    for through, kinds in _ATTEMPTS:
        try:
            return _probed(tensors, calls, energies, seed, kinds, rounds, through=through)
        except Exception as error:  # noqa: BLE001, PERF203  # whatever the model's code makes of gradients; three attempts
            _refuse_exhausted(error)
            log.debug("gradients of %s fail: %s", " and ".join(kinds), error)
            failed = error
    # The same calls ran before without gradients.
    why = "" if failed is None else reason_of(failed)
    log.warning("gradients cannot be taken, so its weights are disturbed one at a time instead (%s)", why)
    return None


def _refuse_exhausted(error: Exception) -> None:
    """Raise an error that is about memory and not about gradients."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
        raise error


def _probed(
    tensors: ModelTensors[nn.Module],
    calls: Sequence[Call],
    energies: Mapping[Key, float],
    seed: int,
    kinds: Sequence[str],
    wanted: int | None,
    *,
    through: bool,
) -> Sensitivity | None:
    copied = tensors.in_copy(shadow(tensors.model))
    gathering = Gathering(copied, kinds, moments=wanted is None, through=through)
    rounds = wanted or rounds_for(len(calls))
    logits = {path for path, is_logits, _ in energies if is_logits}
    leaves_of_call = partial(output_leaves, logits=logits) if energies else last_products
    generator = torch.Generator().manual_seed(seed)
    judged = True
    with torch.enable_grad(), ignoring():  # the model has given its warnings already; others are about gradients
        energies = energies or _energies(copied, calls)
        for turn in range(rounds):
            for i, call in enumerate(calls):
                half = None if len(calls) > 1 or wanted else turn % 2
                leaves = gathering.watched(partial(leaves_of_call, copied, call))
                found = probes_of(leaves, energies, rounds, generator, half)
                if found.outputs:
                    judged = judged and found.judged
                    gathering.along(found.outputs, found.directions, unseen=is_unseen(len(calls), turn, i))
    return sensitivity_of(gathering.sums(rounds), judged=judged)


def rounds_for(calls: int) -> int:
    """How often each of this many calls is probed, with second moments."""
    return max(1, round(_PROBES / calls))


def is_unseen(calls: int, turn: int, call: int) -> bool:
    """Whether the moments of a probe are kept apart: those of every other call, or turn where there is one call."""
    return (call if calls > 1 else turn) % 2 == 1


@dataclass(frozen=True, eq=False)
class Probes:
    """Random directions of the outputs of one call.

    Args:
        outputs: those that count and that a gradient leads from.
        directions: tensors of their shapes.
        judged: there is another half of the samples, where only every other one was asked for.
    """

    outputs: list[Tensor]
    directions: list[Tensor]
    judged: bool = True


def probes_of(
    leaves: Sequence[Leaf], energies: Mapping[Key, float], rounds: int, generator: torch.Generator, half: int | None
) -> Probes:
    """Draw a random direction of what a call returned.

    Args:
        leaves: its outputs.
        energies: the energy of each output, summed over all calls.
        rounds: how often each call is probed.
        generator: gives the random numbers.
        half: 0 or 1: the direction covers only every other sample, beginning with this one; None: all of them.
    """
    leaves = [leaf for leaf in leaves if leaf.value.requires_grad and leaf.key in energies]
    share = share_of_each(energies)
    found: dict[int, tuple[Tensor, Tensor]] = {}  # an output that counts twice, as numbers and as logits, has one
    for leaf in leaves:
        if id(leaf.value) not in found:
            found[id(leaf.value)] = leaf.value, torch.zeros_like(leaf.value, memory_format=torch.contiguous_format)
        _, direction = found[id(leaf.value)]
        leaf.add_probe(direction, (share / ((energies[leaf.key] or 1.0) * rounds)) ** 0.5, generator)
    outputs, directions = [value for value, _ in found.values()], [direction for _, direction in found.values()]
    judged = half is None or all(one.dim() > 0 and len(one) > 1 for one in directions)
    if half is not None and judged:
        directions = [_every_other(one, half) for one in directions]
    return Probes(outputs, directions, judged)


def sensitivity_of(sums: Sums, *, judged: bool = True) -> Sensitivity | None:
    """What the sums of gradients say; None if there are none.

    Args:
        sums: those of all probes.
        judged: whether second moments may be used: there were samples to make them from, and others to judge them by.
    """
    if not sums.rows:
        return None
    if not judged:
        log.warning("error feedback needs two or more samples in the calibration data, and there is one")
        sums = replace(sums, moments={}, unseen={})
    tensors = {
        name: TensorStats(rows, sums.moments.get(name), sums.unseen.get(name), sums.layouts[name], sums.uses.get(name))
        for name, rows in sums.rows.items()
    }
    return Sensitivity(tensors, {name: InputNoise(one.total, one.dynamic) for name, one in sums.noise.items()})


def _energies(tensors: ModelTensors[nn.Module], calls: Iterable[Call]) -> dict[Key, float]:
    """The energies, summed over all calls, of what stands in for the outputs of a model that returns no floats."""
    totals: dict[Key, float] = {}
    for call in calls:
        for leaf in last_products(tensors, call):
            totals[leaf.key] = totals.get(leaf.key, 0.0) + leaf.energy()
    return totals


def output_leaves(tensors: ModelTensors[nn.Module], call: Call, logits: Container[str] = ()) -> list[Leaf]:
    """The floating outputs of a call."""
    return leaves_of(call.on(tensors.model), logits, call.task)


def last_products(tensors: ModelTensors[nn.Module], call: Call) -> list[Leaf]:
    """What stands in for the outputs of a model that returns no floats, such as a decoder that returns tokens.

    These are the products of weights from which no other product was computed.
    """
    ends: list[Tensor] = []

    def tell(product: Product) -> None:
        if product.kind != "embedding":
            ends.append(product.y)

    with ProductWatch(tensors.names, tell):
        call.on(tensors.model)
    return [Leaf(y, path=str(i)) for i, y in enumerate(_last(ends))]


def _last(ends: list[Tensor]) -> list[Tensor]:
    """The tensors from which none of the others was computed."""
    ends = [y for y in ends if y.grad_fn is not None]
    seen: set[Any] = set()
    queue = [node for y in ends if y.grad_fn is not None for node, _ in y.grad_fn.next_functions]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [parent for parent, _ in node.next_functions]
    return [y for y in ends if y.grad_fn not in seen]


def _every_other(direction: Tensor, first: int) -> Tensor:
    """The direction with every other sample zero, as long in the mean as the whole one."""
    kept = torch.zeros_like(direction)
    kept[first::2] = direction[first::2] * 2**0.5
    return kept
