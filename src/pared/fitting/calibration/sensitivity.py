"""What errors cost: the damage that noise in each weight and in each layer's input does to the model's output.

One pass of gradients over recorded calls. For a random direction r of the outputs with `E[r r^T] = I`, the gradient of
`r . y` by a weight has as its mean square the energy that an error of that weight puts into the output (Hutchinson
1990). No labels are needed, and the loss of the user plays no part. The same pass gathers the second moments of
every layer's inputs, each sample weighted by how much the output depends on it, for rounding with error feedback.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from pared.fitting.calibration.blocks import Layout
from pared.fitting.calibration.watch import Product, Watch
from pared.formats.activation import Activation
from pared.formats.views import View, view_of
from pared.model.calls import Call
from pared.model.copies import shadow
from pared.model.outputs import Leaf, leaves_of
from pared.model.tensors import Slot, find_tensors

log = logging.getLogger(__name__)

# A matrix of second moments has at most so many columns: 64 MiB. Wider weights are cut into independent parts.
MOST_COLUMNS: Final = 4096
# Recorded calls are probed in turns until there are about so many probes; each at least once.
_PROBES: Final = 16
LEVELS: Final = 255  # between the ends of an unsigned eight-bit range


LeavesOfCall = Callable[[nn.Module, Call], list[Leaf]]


@dataclass(frozen=True, eq=False)
class TensorStats:
    """What calibration says of one weight.

    Args:
        rows: float64, one per row of the view: the damage if each element of the row had an independent error of
            variance 1.
        moments: float32 (blocks, columns, columns): second moments of the weight's gradients, in which inputs stand
            as the output depends on them; None for tables.
        unseen: the part of `moments` that comes from every other call, or from every other sample of a lone one: to
            judge what was made from the rest.
        layout: how the blocks cover the weight's matrix.
        uses: float64, for tables: how often each row was looked up; None for other weights.
    """

    rows: Tensor
    moments: Tensor | None = None
    unseen: Tensor | None = None
    layout: Layout = field(default_factory=Layout)
    uses: Tensor | None = None

    @property
    def judge(self) -> Tensor | None:
        """The moments that errors are measured with: unseen ones, where there are any."""
        return self.moments if self.unseen is None else self.unseen


@dataclass(frozen=True)
class InputNoise:
    """What noise in one layer's input costs.

    Args:
        total: damage if each input number had an independent error of variance 1.
        dynamic: damage of rounding each row of the input to 255 levels of its own range.
    """

    total: float
    dynamic: float

    def cost(self, activation: Activation) -> float:
        """The damage of treating the input in this way; a static range and its outliers hold all that was seen."""
        if activation.mode == "static":
            return self.total * ((activation.high - activation.low) / LEVELS) ** 2 / 12
        return self.dynamic

    def __add__(self, other: InputNoise) -> InputNoise:
        """Both."""
        return InputNoise(self.total + other.total, self.dynamic + other.dynamic)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The result of the pass: by the first name of each tensor."""

    tensors: Mapping[str, TensorStats]
    inputs: Mapping[str, InputNoise] = field(default_factory=dict)


def measure(
    model: nn.Module, calls: Sequence[Call], energies: Sequence[float], seed: int, *, rounds: int | None = None
) -> Sensitivity | None:
    """Probe the recorded calls with gradients.

    Args:
        model: left as it is.
        calls: what calibration called it with.
        energies: of each floating output, over all calls; empty where there are no such outputs.
        seed: of the random directions.
        rounds: how often each call is probed, without second moments: enough where no error is to be made up for.
            None: until there are about 16 probes, with moments.

    Returns:
        None where nothing can be differentiated: no floating number of the model's products leads to its weights, or a
        gradient fails in the model's own code, as after writing into a tensor that it still needs.
    """
    if not any(slot.fits_grid for slot in find_tensors(model)):
        return Sensitivity({})
    try:
        return _probed(model, calls, energies, seed, ("parameter", "buffer"), rounds)
    except RuntimeError as first:
        _refuse_exhausted(first)
        try:  # a buffer that the forward writes into cannot have a gradient
            return _probed(model, calls, energies, seed, ("parameter",), rounds)
        except RuntimeError as error:
            _refuse_exhausted(error)
            # The same calls ran before without gradients.
            log.warning("no gradient goes through the model, so each weight is disturbed by itself: %s", error)
            return None


def _refuse_exhausted(error: RuntimeError) -> None:
    """Raise what has nothing to do with gradients."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        raise error


def _probed(
    model: nn.Module,
    calls: Sequence[Call],
    energies: Sequence[float],
    seed: int,
    kinds: Sequence[str],
    wanted: int | None,
) -> Sensitivity | None:
    copied = shadow(model)
    pass_ = _Pass(copied, seed, kinds, moments=wanted is None)
    rounds = wanted or max(1, round(_PROBES / len(calls)))
    leaves_of_call = output_leaves if energies else last_products
    with torch.enable_grad():
        energies = energies or _energies(copied, calls)
        for turn in range(rounds):
            for i, call in enumerate(calls):
                scaled = [(e or 1.0) * rounds for e in energies]
                if len(calls) > 1 or wanted:
                    pass_.probe(leaves_of_call, call, scaled, unseen=i % 2 == 1)
                else:
                    pass_.probe(leaves_of_call, call, scaled, unseen=turn % 2 == 1, half=turn % 2)
    return pass_.result(rounds)


def _energies(model: nn.Module, calls: Iterable[Call]) -> list[float]:
    """The energies, over all calls, of what stands in for outputs that are not floats."""
    totals: list[float] = []
    for call in calls:
        leaves = last_products(model, call)
        totals += [0.0] * (len(leaves) - len(totals))
        for i, leaf in enumerate(leaves):
            totals[i] += leaf.energy()
    return totals


def output_leaves(model: nn.Module, call: Call) -> list[Leaf]:
    """The floating outputs of a call."""
    return leaves_of(model(*call.args, **call.kwargs))


def last_products(model: nn.Module, call: Call) -> list[Leaf]:
    """What stands in for the outputs of a model that returns no floats, a decoder that returns tokens for instance.

    They are the products of weights that no other product was computed from.
    """
    ends: list[Tensor] = []
    names = {id(one): slot.name for slot in find_tensors(model) for one in slot.objects}

    def tell(product: Product) -> None:
        if product.kind != "embedding":
            ends.append(product.y)

    with Watch(names, tell):
        model(*call.args, **call.kwargs)
    return [Leaf(y) for y in _last(ends)]


def _last(ends: list[Tensor]) -> list[Tensor]:
    """Those of the tensors that no other one was computed from."""
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
    """Gathers everything while gradients flow."""

    def __init__(self, model: nn.Module, seed: int, kinds: Sequence[str], *, moments: bool) -> None:
        self._model = model
        self._wants_moments = moments
        self._generator = torch.Generator().manual_seed(seed)
        self.slots = [slot for slot in find_tensors(model) if slot.fits_grid and slot.kind in kinds]
        self._views = {slot.name: view_of(slot.module, slot.attribute, tuple(slot.tensor.shape)) for slot in self.slots}
        self._names = {id(one): slot.name for slot in self.slots for one in slot.objects}
        self._rows: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}
        self._unseen: dict[str, Tensor] = {}
        self._layouts = {slot.name: _layout(slot, self._views[slot.name]) for slot in self.slots}
        self._uses: dict[str, Tensor] = {}
        self._otherwise: set[str] = set()  # what other functions than the watched ones had as well
        self._noise: dict[str, _Noise] = {}
        self._first: list[Tensor] = []
        self._judged = True
        self._refused: set[str] = set()
        for slot in self.slots:
            slot.tensor.requires_grad_(True)

    def probe(
        self,
        leaves_of_call: LeavesOfCall,
        call: Call,
        energies: Sequence[float],
        *,
        unseen: bool,
        half: int | None = None,
    ) -> None:
        """One call, one random direction; the moments of unseen ones are also kept apart.

        With a half, 0 or 1, the direction is that of every other sample, starting there: their first dimension.
        """
        self._first = []
        for buffer in self._model.buffers():
            if buffer.grad_fn is not None:
                buffer.detach_()  # written by the last call, whose graph is gone
        with Watch(self._names, self._tell, gradients=True) as watch:
            leaves = leaves_of_call(self._model, call)
        self._otherwise |= watch.otherwise
        pairs = [(leaf, e) for leaf, e in zip(leaves, energies, strict=False) if leaf.value.requires_grad]
        if not pairs:
            return
        directions = [leaf.probe(self._generator) / (energy * len(leaves)) ** 0.5 for leaf, energy in pairs]
        if half is not None:
            self._judged = all(one.dim() > 0 and len(one) > 1 for one in directions)
            directions = [_every_other(one, half) for one in directions] if self._judged else directions
        wanted = [slot.tensor for slot in self.slots]
        outputs = [leaf.value for leaf, _ in pairs]
        # The model's own inputs have to be asked for: no weight stands before them.
        found = torch.autograd.grad(outputs, wanted + self._first, directions, allow_unused=True)
        for slot, gradient in zip(self.slots, found[: len(wanted)], strict=True):
            if gradient is not None:
                self._gather(slot.name, self._views[slot.name].matrix(gradient).float(), unseen)

    def _gather(self, name: str, gradient: Tensor, unseen: bool) -> None:
        """Add a weight's gradient, as a matrix, to what is known of its rows and of its columns."""
        rows = gradient.double().square().sum(1)
        if not bool(rows.isfinite().all()):
            if name not in self._refused:  # once is enough
                log.warning("%s: a gradient is not finite, and does not count", name)
            self._refused.add(name)
            return
        _add(self._rows, name, rows)
        is_table = name in self._uses and name not in self._noise and name not in self._otherwise
        if self._wants_moments and not is_table and self._views[name].rows:
            # A row of a table, or a bias, meets no inputs that could make up for each other's errors.
            blocks = self._layouts[name].blocks(gradient)
            moments = torch.bmm(blocks.transpose(1, 2), blocks)
            _add(self._moments, name, moments)
            if unseen:
                _add(self._unseen, name, moments)

    def _tell(self, product: Product) -> None:
        if product.kind == "embedding":
            view = self._views[product.tensor]
            if view.rows == (0,):  # where each entry has a step of its own
                counted = torch.bincount(product.x.reshape(-1), minlength=view.n_rows)
                _add(self._uses, product.tensor, counted.double())
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
            log.warning("one sample says nothing of others: error feedback needs two or more in the calibration data")
            self._moments, self._unseen = {}, {}
        uses = {name: counted / rounds for name, counted in self._uses.items()}
        tensors = {
            name: TensorStats(
                rows, self._moments.get(name), self._unseen.get(name), self._layouts[name], uses.get(name)
            )
            for name, rows in self._rows.items()
        }
        return Sensitivity(tensors, {name: noise.result() for name, noise in self._noise.items() if noise.seen})


def _every_other(direction: Tensor, first: int) -> Tensor:
    """The samples from the first on, as long as all of them are in the mean."""
    kept = torch.zeros_like(direction)
    kept[first::2] = direction[first::2] * 2**0.5
    return kept


def _add(known: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in known:
        known[name] += value
    else:
        known[name] = value.clone()


class _Noise:
    """What noise in one layer's input costs, gathered over products."""

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
            return  # the gradient of the weight is not finite either, which is told
        self._total += total
        reach = (flat.amax(1).clamp(min=0) - flat.amin(1).clamp(max=0)) / LEVELS
        self._dynamic += float((reach.square() / 12 * spread.sum(1)).sum())

    def result(self) -> InputNoise:
        return InputNoise(self._total, self._dynamic)


def _layout(slot: Slot, view: View) -> Layout:
    groups = getattr(slot.module, "groups", 1) if slot.attribute == "weight" else 1
    if not isinstance(groups, int) or groups < 1 or view.n_rows % groups:
        groups = 1
    return Layout(groups, _parts(view.n_columns))


def _parts(columns: int) -> int:
    """The least number of parts of at most `MOST_COLUMNS` columns."""
    return max(1, -(-columns // MOST_COLUMNS))
