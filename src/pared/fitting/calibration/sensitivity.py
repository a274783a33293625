"""What errors cost: how much noise in each weight and in each layer's input damages the model's output.

One pass of gradients over recorded calls. For a random direction r of the outputs with `E[r r^T] = I`, the gradient of
`r . y` by a weight has a mean square that is the energy which an error of that weight puts into the output (Hutchinson
1990). Neither labels nor a loss function are needed. The same pass gathers the second moments of
every layer's inputs, each sample weighted by how much the output depends on it, for rounding with error feedback.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from pared.errors import reason_of
from pared.fitting.calibration.blocks import Blocks, add_up, blocks_of, by_name, complete
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
LEVELS: Final = 255  # steps between the ends of an unsigned 8-bit range

# How gradients are taken: first through where the model cuts them off, which fails where it then writes into a weight.
# A buffer that the forward writes into cannot have a gradient.
_ATTEMPTS: Final = ((True, ("parameter", "buffer")), (False, ("parameter", "buffer")), (False, ("parameter",)))

_SMALL: Final = 4096  # numbers: tensors with fewer are added up together, if they are alike

LeavesOfCall = Callable[[ModelTensors[nn.Module], Call], list[Leaf]]


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
        uses: float64 (rows,): how often each row of an embedding table was looked up; None for other weights.
    """

    rows: Tensor
    moments: Tensor | None = None
    unseen: Tensor | None = None
    layout: Blocks = field(default_factory=Blocks)
    uses: Tensor | None = None
    inputs: Tensor | None = None

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
            return self.total * ((activation.high - activation.low) / LEVELS) ** 2 / 12
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
    pass_ = _Pass(copied, seed, kinds, moments=wanted is None, through=through)
    rounds = wanted or max(1, round(_PROBES / len(calls)))
    logits = {path for path, is_logits, _ in energies if is_logits}
    leaves_of_call = partial(output_leaves, logits=logits) if energies else last_products
    with torch.enable_grad(), ignoring():  # the model has given its warnings already; others are about gradients
        energies = energies or _energies(copied, calls)
        for turn in range(rounds):
            for i, call in enumerate(calls):
                scaled = {key: (energy or 1.0) * rounds for key, energy in energies.items()}
                if len(calls) > 1 or wanted:
                    pass_.probe(leaves_of_call, call, scaled, unseen=i % 2 == 1)
                else:
                    pass_.probe(leaves_of_call, call, scaled, unseen=turn % 2 == 1, half=turn % 2)
    return pass_.result(rounds)


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


class _Pass:
    """Sums up what the gradients of all probes show."""

    def __init__(
        self, tensors: ModelTensors[nn.Module], seed: int, kinds: Sequence[str], *, moments: bool, through: bool
    ) -> None:
        self._tensors = tensors
        self._wants_moments = moments
        self._through = through
        self._generator = torch.Generator().manual_seed(seed)
        self._probed = {tensor.name: tensor for tensor in tensors if tensor.fits_grid and tensor.kind in kinds}
        self._names = {key: name for key, name in tensors.names.items() if name in self._probed}
        # For tensors alike, by their names: of all together, (tensors, ...).
        self._rows: dict[tuple[str, ...], Tensor] = {}
        self._moments: dict[tuple[str, ...], Tensor] = {}
        self._unseen: dict[tuple[str, ...], Tensor] = {}
        self._layouts = {name: blocks_of(tensor) for name, tensor in self._probed.items()}
        self._uses: dict[str, Tensor] = {}
        self._otherwise: set[str] = set()  # used by other functions than the watched ones, too
        self._noise: dict[str, _Noise] = {}
        self._first: list[Tensor] = []
        self._judged = True
        self._refused: set[str] = set()
        for tensor in self._probed.values():
            tensor.tensor.requires_grad_(True)

    def probe(
        self,
        leaves_of_call: LeavesOfCall,
        call: Call,
        energies: Mapping[Key, float],
        *,
        unseen: bool,
        half: int | None = None,
    ) -> None:
        """Take the gradients of one call along one random direction.

        Args:
            leaves_of_call: gives the outputs of a call.
            call: is repeated.
            energies: the energy of each output, for all probes together.
            unseen: also keep the moments of this probe apart, in `TensorStats.unseen`.
            half: 0 or 1: the direction covers only every other sample, beginning with this one; None: all of them.
        """
        self._first = []
        for buffer in self._tensors.model.buffers():
            if buffer.grad_fn is not None:
                buffer.detach_()  # written by the last call, whose graph is gone
        with ProductWatch(self._names, self._tell, gradients=True, through=self._through) as watch:
            leaves = leaves_of_call(self._tensors, call)
        self._otherwise |= watch.otherwise
        leaves = [leaf for leaf in leaves if leaf.value.requires_grad and leaf.key in energies]
        if not leaves:
            return
        share = share_of_each(energies)
        directions = [leaf.probe(self._generator) * (share / energies[leaf.key]) ** 0.5 for leaf in leaves]
        if half is not None:
            self._judged = all(d.dim() > 0 and len(d) > 1 for d in directions)
            directions = [_every_other(d, half) for d in directions] if self._judged else directions
        wanted = [tensor.tensor for tensor in self._probed.values()]
        outputs = [leaf.value for leaf in leaves]
        # The gradients of the model's own inputs come only when asked for: no weight stands before them.
        found = torch.autograd.grad(outputs, wanted + self._first, directions, allow_unused=True)
        for names, gradients in self._alike(found[: len(wanted)]):
            self._gather(names, gradients, unseen)

    def _alike(self, gradients: Sequence[Tensor | None]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """The gradients of all probed tensors, (tensors, rows, columns); small ones of the same view together."""
        groups: dict[object, list[tuple[str, Tensor]]] = {}
        for (name, tensor), gradient in zip(self._probed.items(), gradients, strict=True):
            if gradient is not None:
                small = tensor.view, gradient.dtype, self._layouts[name], self._is_table(name)
                key = small if gradient.numel() <= _SMALL else name
                groups.setdefault(key, []).append((name, tensor.view.matrix(gradient)))
        for group in groups.values():
            names, matrices = zip(*group, strict=True)
            yield names, (torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]).float()

    def _is_table(self, name: str) -> bool:
        return name in self._uses and name not in self._noise and name not in self._otherwise

    def _gather(self, names: tuple[str, ...], gradients: Tensor, unseen: bool) -> None:
        """Add gradients, (tensors, rows, columns), to the sums over their rows and to their second moments."""
        rows = gradients.double().square().sum(2)
        finite = rows.isfinite().all(1)
        if not bool(finite.all()):
            refused = {name for name, is_finite in zip(names, finite.tolist(), strict=True) if not is_finite}
            for name in sorted(refused - self._refused):  # once is enough
                log.warning("%s: a gradient is not finite, and is left out", name)
            self._refused |= refused
            names = tuple(name for name in names if name not in refused)
            gradients, rows = gradients[finite], rows[finite]
        if not names:
            return
        add_up(self._rows, names, rows)
        if self._wants_moments and not self._is_table(names[0]) and self._probed[names[0]].view.rows:
            # A table or a bias has no inputs whose errors could make up for each other.
            layout = self._layouts[names[0]]
            together = replace(layout, groups=layout.groups * len(names))
            blocks = together.blocks(gradients.flatten(0, 1))
            moments = torch.bmm(blocks.transpose(1, 2), blocks).unflatten(0, (len(names), -1))
            add_up(self._moments, names, moments)
            if unseen:
                add_up(self._unseen, names, moments)

    def _tell(self, product: Product) -> None:
        if product.kind == "embedding":
            view = self._probed[product.tensor].view
            if view.rows == (0,):  # where each entry has a step of its own
                counted = torch.bincount(product.x.reshape(-1), minlength=view.n_rows)
                add_up(self._uses, product.tensor, counted.double())
        elif product.x.requires_grad:
            # What a hook holds must not lead back to what it hangs on: such rings keep whole graphs in memory.
            noise, x, by_rows = (
                self._noise.setdefault(product.tensor, _Noise()),
                product.x.detach(),
                product.kind == "linear",
            )
            product.x.register_hook(lambda gradient: noise.add(x, gradient, by_rows))
            if product.x.is_leaf:
                self._first.append(product.x)

    def result(self, rounds: int) -> Sensitivity | None:
        if not self._rows:
            return None
        if not self._judged:
            log.warning("error feedback needs two or more samples in the calibration data, and there is one")
            self._moments, self._unseen = {}, {}
        uses = {name: counted / rounds for name, counted in self._uses.items()}
        rows, moments, unseen = map(by_name, (self._rows, self._moments, self._unseen))
        for name, part in unseen.items():
            complete(part, moments[name])
        tensors = {
            name: TensorStats(rows[name], moments.get(name), unseen.get(name), self._layouts[name], uses.get(name))
            for name in self._probed
            if name in rows
        }
        return Sensitivity(tensors, {name: noise.result() for name, noise in self._noise.items() if noise.seen})


def _every_other(direction: Tensor, first: int) -> Tensor:
    """The direction with every other sample zero, as long in the mean as the whole one."""
    kept = torch.zeros_like(direction)
    kept[first::2] = direction[first::2] * 2**0.5
    return kept


class _Noise:
    """What noise in one layer's input costs, summed over its products."""

    def __init__(self) -> None:
        self._total = self._dynamic = 0.0

    @property
    def seen(self) -> bool:
        return self._total > 0

    def add(self, x: Tensor, gradient: Tensor, by_rows: bool) -> None:
        energy = gradient.float().square()
        flat, spread = (t.reshape(-1, t.shape[-1] if by_rows else t.numel()) for t in (x.float(), energy))
        total = float(spread.sum())
        if not math.isfinite(total):
            return  # the gradient of the weight is not finite either, of which `_gather` warns
        self._total += total
        reach = (flat.amax(1).clamp(min=0) - flat.amin(1).clamp(max=0)) / LEVELS
        self._dynamic += float((reach.square() / 12 * spread.sum(1)).sum())

    def result(self) -> InputNoise:
        return InputNoise(self._total, self._dynamic)
