"""Makes quantized models of any damage or size from one set of statistics: what the search works with."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from pared.errors import ConfigError
from pared.fitting.calibration.observe import Statistics
from pared.fitting.calibration.sensitivity import Sensitivity, TensorStats
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.rounding import plan
from pared.fitting.search import allocate
from pared.fitting.search.activations import Candidate, choose_activations, find_candidates
from pared.fitting.search.allocate import Choice
from pared.fitting.search.options import GRID_ENTRY, rounded, trace_slot
from pared.formats.activation import Activation
from pared.formats.coded import Coded, Grid
from pared.formats.views import View, view_of
from pared.model import storage
from pared.model.contents import Contents, Decision, Plan, Stored
from pared.model.tensors import Slot
from pared.runtime import quantized
from pared.runtime.profile import Profile, this_machine
from pared.version import __version__

log = logging.getLogger(__name__)

ModuleT_co = TypeVar("ModuleT_co", bound=nn.Module, covariant=True)

# Where a search begins, and what a model costs that nobody evaluates: a thousandth of the output's energy.
DEFAULT_DAMAGE: Final = 1e-3

# Of the damage asked for, the share that rounding the inputs of layers may do: it buys speed, but no bytes.
ACTIVATION_SHARE: Final = 0.1
# ... where the user has asked for static or dynamic activations.
_WISHED_SHARE: Final = 0.5

# Bytes that the scores of the search may add to an index later, at most.
RESERVE: Final = 700

_LEAST_SHARE: Final = 0.01  # of what the median tensor counts
_MOST_TOTAL: Final = 10.0  # ... which is at most this, at a relative error of 1: beyond, squares say nothing
_FEWER_RULES: Final = "Allow more bytes, or give fewer rules that keep tensors in float."
_LESS_THAN_EIGHT: Final = (
    'quant_level=0 allows nothing coarser than 8 bits: allow more bytes, or take quant_level="auto".'
)
_ALIGNED: Final = 64  # bytes by which a file grows at once
_ROUNDS: Final = 10  # of closing in on max_size
_MOST_ROUNDS: Final = 60  # ... and of stepping down until a file fits


@dataclass(frozen=True)
class Offer:
    """A model that can be built: the format of every tensor, and what is predicted of it.

    Args:
        choice: the option of each tensor whose step is free.
        damage: predicted: the expected share of the output's energy that is lost, activations included; above 0.
        nbytes: planned, of `best_model.pt`.
    """

    choice: Choice
    damage: float
    nbytes: int

    @property
    def price(self) -> float:
        """The damage per byte at which the choice is optimal."""
        return self.choice.price


class Compressor(Generic[ModuleT_co]):
    """Makes quantized models of any damage or size from one set of statistics.

    `least` and `most` are the damages of the finest and of the smallest model on offer.

    Args:
        model: the float model; it is left as it is.
        slots: its tensors.
        conf: what is wanted.
        seen: what calibration saw; None without it.
        sensitivity: what errors cost; None where it was not measured: then every tensor's relative error counts alike.
        obey: use the approach asked for in every layer that has it, whatever it costs.
    """

    def __init__(
        self,
        model: ModuleT_co,
        slots: Sequence[Slot],
        conf: PostTrainingQuantConfig,
        seen: Statistics | None,
        sensitivity: Sensitivity | None,
        *,
        obey: bool = False,
    ) -> None:
        self._model = model
        self._slots = slots
        self._conf = conf
        self._seen = seen
        self._noise = sensitivity.inputs if sensitivity else {}
        self._obey = obey
        self._plan: Plan = plan.make_plan(model, slots, conf.rules, bits=None, strict=conf.strict)
        self._fixed = {
            slot.name: plan.encode(slot, decision)
            for slot, decision in zip(slots, self._plan, strict=True)
            if not _is_free(decision)
        }
        free = [slot for slot, decision in zip(slots, self._plan, strict=True) if _is_free(decision)]
        known = _complete(free, sensitivity.tensors if sensitivity else {})
        fine = conf.quant_level == 0
        self._free = [trace_slot(slot, known[slot.name], strict=conf.strict, fine=fine) for slot in free]
        self._options = [one.options for one in self._free]
        self._solved: dict[tuple[str, int], Coded] = {}
        self._overhead = self._measure_overhead()
        finest, coarsest = (allocate.choose(self._options, price) for price in allocate.ends(self._options))
        self.least = max(finest.damage * 2, 1e-12)
        # With a hair more, so that the smallest itself is on offer whatever the division rounds to.
        self.most = max(coarsest.damage * (1 + 1e-9) / (1 - self._share), self.least)

    def offer(self, damage: float) -> Offer:
        """The smallest plan whose predicted damage is at most this."""
        return self._offered(allocate.within_damage(self._options, damage * (1 - self._share)), damage)

    def offer_bytes(self, nbytes: int) -> Offer:
        """The plan of least damage whose file takes at most so many bytes; it is rounded and measured.

        Raises:
            ConfigError: even the smallest file is larger.
        """
        wanted = nbytes - RESERVE
        planned = float(wanted)
        best: Choice | None = None
        low, high = 0.0, float("inf")  # planned bytes known to fit, and known not to
        for attempt in range(_MOST_ROUNDS):
            spend = planned - self._overhead
            choice = allocate.fill(self._options, allocate.within_bytes(self._options, spend), spend)
            real = self._nbytes(choice)
            if real <= wanted:
                best, low = choice, planned
            else:
                high = planned
            if best is None and choice.nbytes > spend:
                break  # nothing smaller is on offer
            if best is not None and (attempt >= _ROUNDS or wanted >= real > 0.998 * wanted):
                break
            if attempt < _ROUNDS:
                planned += wanted - real - (_ALIGNED if real > wanted else 0)
            else:
                planned *= 0.97
            if best is not None and not low < planned < high:
                planned = (low + high) / 2 if np.isfinite(high) else low * 1.01
        if best is None:
            raise self._too_small(nbytes)
        return self._offered(best, best.damage / (1 - self._share))

    def _too_small(self, nbytes: int) -> ConfigError:
        coarsest = allocate.choose(self._options, allocate.ends(self._options)[1])
        return ConfigError(
            f"max_size is {nbytes:,} bytes, and the smallest file takes {self._nbytes(coarsest) + RESERVE:,}",
            where="PostTrainingQuantConfig",
            remedy=_LESS_THAN_EIGHT if self._conf.quant_level == 0 else _FEWER_RULES,
        )

    @property
    def _share(self) -> float:
        """The share of the damage that is left to activations."""
        if self._conf.approach == "weight_only" or not self._noise:
            return 0.0
        return ACTIVATION_SHARE if self._conf.approach == "auto" else _WISHED_SHARE

    def _offered(self, choice: Choice, damage: float) -> Offer:
        return Offer(choice, damage, round(choice.nbytes + self._overhead))

    def _stored(self, choice: Choice) -> tuple[Stored, ...]:
        """Every tensor in its format; what an earlier call has rounded alike is not rounded again."""
        keys = {one.slot.name: (one, option) for one, option in zip(self._free, choice.options, strict=True)}
        solved = {}
        stored = []
        for slot, decision in zip(self._slots, self._plan, strict=True):
            if slot.name not in keys:
                stored.append(Stored(slot.names, slot.kind, self._fixed[slot.name], decision))
                continue
            one, option = keys[slot.name]
            coded = self._solved.get((slot.name, option)) or rounded(one, option)
            solved[slot.name, option] = coded
            stored.append(Stored(slot.names, slot.kind, coded, one.decision(option)))
        self._solved = solved
        return tuple(stored)

    def _measure_overhead(self) -> int:
        """What a file takes beside the numbers of its free tensors: one is written whose free tensors are all zero."""
        empty = {one.slot.name: _zeros(one.slot, one.target.view) for one in self._free}
        stored = [
            Stored(slot.names, slot.kind, empty.get(slot.name) or self._fixed[slot.name], decision)
            for slot, decision in zip(self._slots, self._plan, strict=True)
        ]
        numbers = [part for coded in empty.values() for part in coded.format.streams(coded).values()]
        whole = len(storage.to_bytes(self._contents(stored, DEFAULT_DAMAGE)))
        return whole - sum(len(part.payload) for part in numbers) - GRID_ENTRY * len(empty)

    def _nbytes(self, choice: Choice) -> int:
        contents = self._contents(self._stored(choice), choice.damage)
        return len(storage.to_bytes(contents))

    def _contents(self, stored: Sequence[Stored], damage: float) -> Contents:
        activations = self._activations(self._candidates(stored), damage)
        return Contents(tuple(stored), activations, provenance(self._conf, self._seen))

    def _candidates(self, stored: Sequence[Stored]) -> list[Candidate]:
        return find_candidates(self._model, stored, self._seen.inputs if self._seen else None)

    def _activations(self, candidates: Sequence[Candidate], damage: float) -> dict[str, Activation]:
        share = self._share
        obeyed = self._obey and self._conf.approach != "auto"
        budget = float("inf") if obeyed else damage * share / (1 - share)
        return choose_activations(candidates, self._conf.approach, self._noise, budget)

    def build(self, offer: Offer) -> ModuleT_co:
        """The quantized model of an offer.

        Layers that may run in int8 do: which kernels are fastest is no part of what is scored, so that the same search
        gives the same file on a busy machine.
        """
        choice = offer.choice
        contents = self._contents(self._stored(choice), choice.damage)
        return quantized.assemble(self._model, contents, Profile(this_machine()))

    def blame(self, offer: Offer) -> list[tuple[str, float]]:
        """Tensors and activations by falling share of the damage."""
        choice = offer.choice
        costs = {
            one.slot.name: float(one.options.damage[option])
            for one, option in zip(self._free, choice.options, strict=True)
        }
        candidates = self._candidates(self._stored(choice))
        activations = self._activations(candidates, choice.damage)
        for candidate in candidates:
            activation, noise = activations.get(candidate.name), candidate.noise(self._noise)
            if activation is not None and noise is not None and activation.mode != "gather":
                costs[f"{candidate.name} (input, {activation.mode})"] = noise.cost(activation)
        total = sum(costs.values()) or 1.0
        return sorted(((name, cost / total) for name, cost in costs.items()), key=lambda pair: -pair[1])


def provenance(conf: PostTrainingQuantConfig, seen: Statistics | None) -> dict[str, Any]:
    """Where a model comes from: plain data for its artifact."""
    return {
        "pared": __version__,
        "torch": str(torch.__version__),
        "calibration_samples": seen.samples if seen else 0,
        "seed": conf.seed,
        "approach": conf.approach,
    }


def _is_free(decision: Decision) -> bool:
    return decision.treatment == "grid" and decision.bits is None


def _complete(slots: Sequence[Slot], known: Mapping[str, TensorStats]) -> dict[str, TensorStats]:
    """Statistics of every tensor.

    One that no output depends on, as far as was seen, counts like the median one at the same relative error; and none
    counts less than a hundredth of that: what calibration hardly touches is not wiped out.
    """
    energies = {slot.name: float(slot.tensor.detach().float().square().mean()) or 1.0 for slot in slots}
    totals = {name: float(stats.rows.sum()) * energies[name] for name, stats in known.items() if name in energies}
    seen = [total for total in totals.values() if 0 < total < math.inf]
    relative = min(float(np.median(seen)), _MOST_TOTAL) if seen else 1.0 / max(1, len(slots))
    found = {}
    for slot in slots:
        stats, total = known.get(slot.name), totals.get(slot.name, 0.0)
        if stats is None or not 0 < total < math.inf:
            rows = view_of(slot.module, slot.attribute, tuple(slot.tensor.shape)).n_rows
            stats = TensorStats(torch.full((rows,), relative / energies[slot.name] / rows, dtype=torch.float64))
        elif total < _LEAST_SHARE * relative:
            stats = replace(stats, rows=stats.rows * (_LEAST_SHARE * relative / total))
        found[slot.name] = stats
    return found


def _zeros(slot: Slot, view: View) -> Coded:
    shape = tuple(slot.tensor.shape)
    parts = {"codes": torch.zeros(shape, dtype=torch.int8), "step": torch.ones(view.row_sizes)}
    return Coded(Grid("int8"), shape, slot.tensor.dtype, parts, view)
