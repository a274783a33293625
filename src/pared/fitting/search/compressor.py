"""Makes quantized models of any damage or size from one set of statistics: what the search works with."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic

import torch

from pared import allocate
from pared.allocate import Choice
from pared.errors import ConfigError
from pared.fitting.calibration.observe import Statistics
from pared.fitting.calibration.sensitivity import Sensitivity
from pared.fitting.config import OWN, PostTrainingQuantConfig
from pared.fitting.search.activations import Candidate, choose_activations, find_candidates
from pared.fitting.search.free.choices import choices_for
from pared.fitting.search.free.free import Free, name_of
from pared.formats.activation import Activation
from pared.formats.coded import Coded
from pared.model.contents import Contents, Decision, Stored
from pared.model.state import extra
from pared.model.tensors import ModelTensors, ModuleT_co
from pared.runtime import quantized
from pared.runtime.profile.profile import Profile, this_machine
from pared.version import __version__

log = logging.getLogger(__name__)

# Damage at which a search begins, and of a model that nobody evaluates: a thousandth of the output's energy.
DEFAULT_DAMAGE: Final = 1e-3

# Share of the damage that rounding the inputs of layers may do, which makes a model faster but not smaller ...
ACTIVATION_SHARE: Final = 0.1
# ... and that share where the user asked for static or dynamic activations.
_REQUESTED_ACTIVATION_SHARE: Final = 0.5

# Bytes that stay free below max_size: the search later adds its scores to the index ...
RESERVE: Final = 700
# ... or, without scores, an empty outcome.
RESERVE_WITHOUT_SCORES: Final = 64

# Closing in on max_size: attempts that correct the planned bytes by what the last file was off, then attempts at
# ever fewer planned bytes until a file fits; it is close enough at this share of the bytes.
_CORRECTING_ATTEMPTS: Final = 10
_MAX_ATTEMPTS: Final = 60
_FEWER_BYTES: Final = 0.97
_CLOSE_ENOUGH: Final = 0.998
_ALIGNMENT: Final = 64  # bytes: a file grows in steps of this size

_FEWER_RULES: Final = "Allow more bytes, or give fewer rules that keep tensors in float."
_LESS_THAN_EIGHT: Final = (
    'quant_level=0 allows nothing coarser than 8 bits: allow more bytes, or take quant_level="auto".'
)


@dataclass(frozen=True)
class OperatingPoint:
    """A point on the trade-off between bytes and damage: a model that can be built, and what is predicted of it.

    Args:
        choice: the option of each tensor whose step is free.
        damage: predicted share of the output's energy that is lost, activations included; above 0.
        nbytes: predicted size of `best_model.pt`.
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

    `least` and `most` are the damages of the finest and of the smallest model that can be made.

    Args:
        model_tensors: the tensors of the float model, which is left as it is.
        conf: what is wanted.
        seen: what calibration saw; None without calibration.
        sensitivity: what errors cost; None if it was not measured: the same relative error then costs the same in
            every tensor.
        obey: use the requested approach in every layer that supports it, whatever the damage.

    Raises:
        ConfigError: a rule matches nothing, or `conf.strict` and a tensor would stay in float without a rule.
    """

    def __init__(
        self,
        model_tensors: ModelTensors[ModuleT_co],
        conf: PostTrainingQuantConfig,
        seen: Statistics | None,
        sensitivity: Sensitivity | None,
        *,
        obey: bool = False,
    ) -> None:
        self._model_tensors = model_tensors
        self._conf = conf
        self._seen = seen
        self._noise = sensitivity.inputs if sensitivity else {}
        self._obey = obey
        self._states = extra.collect(model_tensors.model)
        self._choices = choices_for(model_tensors, conf, sensitivity)
        self._free = self._choices.free
        self._rounded: dict[tuple[str, int], tuple[Coded, ...]] = {}  # the last model's, by first name and option
        self._inputs = 1.0  # the part of their share of the damage that inputs may do
        self._overhead = self._measure_overhead()
        self._set_ends()

    def corrected(self, factors: Mapping[str, float], inputs: float) -> Compressor[ModuleT_co]:
        """The same where some predictions are corrected.

        Args:
            factors: how many times the predicted damage a tensor does, by its first name.
            inputs: the part of their share of the damage that int8 inputs may still do.

        Returns:
            itself if nothing is corrected, so that what was rounded is not rounded again.
        """
        if not factors and inputs == self._inputs:
            return self
        other = copy.copy(self)
        other._free = [free.corrected(factors) for free in self._free]
        other._rounded, other._inputs = dict(self._rounded), inputs
        other._set_ends()
        return other

    def _set_ends(self) -> None:
        self._options = allocate.Table([free.options for free in self._free])
        finest, coarsest = (allocate.choose(self._options, price) for price in allocate.ends(self._options))
        self.least = max(finest.damage * 2, 1e-12)
        # A little more, so that the smallest model stays within reach in spite of floating-point rounding.
        self.most = max(coarsest.damage * (1 + 1e-9) / (1 - self._activation_share), self.least)

    def at_damage(self, damage: float) -> OperatingPoint:
        """The smallest plan whose predicted damage is at most this."""
        choice = allocate.within_damage(self._options, damage * (1 - self._activation_share))
        return self._point(choice, damage)

    def within_bytes(self, nbytes: int, reserve: int = RESERVE) -> OperatingPoint:
        """The plan of least damage whose file is at most `nbytes` large, less the bytes that stay free for the outcome.

        Predicted sizes are a little off, so the model is rounded and coded for each attempt: up to 60 times, though
        tensors that keep their option are not rounded again.

        Raises:
            ConfigError: even the smallest file is larger.
        """
        wanted = nbytes - reserve
        planned = float(wanted)
        best: Choice | None = None
        fitting, too_many = 0.0, math.inf  # planned bytes whose file fits, and whose file does not
        for attempt in range(_MAX_ATTEMPTS):
            budget = planned - self._overhead
            choice = allocate.fill(self._options, allocate.within_bytes(self._options, budget), budget)
            real = self._nbytes(choice)
            if real <= wanted:
                best, fitting = choice, planned
            else:
                too_many = planned
            if best is None and choice.nbytes > budget:
                break  # there is nothing smaller
            if best is not None and (attempt >= _CORRECTING_ATTEMPTS or wanted >= real > _CLOSE_ENOUGH * wanted):
                break
            if attempt < _CORRECTING_ATTEMPTS:
                planned += wanted - real - (_ALIGNMENT if real > wanted else 0)
            else:
                planned *= _FEWER_BYTES
            if best is not None and not fitting < planned < too_many:
                planned = (fitting + too_many) / 2 if math.isfinite(too_many) else fitting * 1.01
        if best is None:
            raise self._too_small(nbytes, reserve)
        return self._point(best, best.damage / (1 - self._activation_share))

    def _too_small(self, nbytes: int, reserve: int) -> ConfigError:
        coarsest = allocate.choose(self._options, allocate.ends(self._options)[1])
        return ConfigError(
            f"max_size is {nbytes:,} bytes, and the smallest file takes {self._nbytes(coarsest) + reserve:,}",
            where="PostTrainingQuantConfig",
            remedy=_LESS_THAN_EIGHT if self._conf.quant_level == 0 else _FEWER_RULES,
        )

    @property
    def _activation_share(self) -> float:
        """The share of the damage that is left to activations."""
        if self._conf.approach == "weight_only" or not self._noise:
            return 0.0
        share = ACTIVATION_SHARE if self._conf.approach == "auto" else _REQUESTED_ACTIVATION_SHARE
        return share * self._inputs

    def _point(self, choice: Choice, damage: float) -> OperatingPoint:
        return OperatingPoint(choice, damage, round(choice.nbytes + self._overhead))

    def _chosen(self, choice: Choice) -> list[tuple[Free, int]]:
        """What is free, each with its option."""
        return list(zip(self._free, choice.options, strict=True))

    def _stored(self, choice: Choice) -> list[Stored]:
        """Every tensor in its format. What keeps the option of the last call is not rounded again."""
        earlier, self._rounded = self._rounded, {}
        found: dict[str, tuple[Coded, Decision]] = {}
        for free, option in self._chosen(choice):
            key = free.tensors[0].name, option
            coded = self._rounded[key] = earlier.get(key) or free.coded(option)
            found |= _by_name(free, coded, free.decisions(option))
        return self._all_stored(found)

    def _all_stored(self, free: Mapping[str, tuple[Coded, Decision]]) -> list[Stored]:
        """Every tensor, where these are what the allocation decides about."""
        stored = []
        for model_tensor, planned in zip(self._model_tensors, self._choices.plan, strict=True):
            name = model_tensor.name
            coded, decision = free[name] if name in free else (self._choices.fixed[name], planned)
            stored.append(Stored(model_tensor.names, model_tensor.kind, coded, decision))
        return stored

    def _measure_overhead(self) -> int:
        """Bytes of a file beside those that the options count, from one that holds something in their place."""
        held: dict[str, tuple[Coded, Decision]] = {}
        planned = {decision.name: decision for decision in self._choices.plan}
        counted = 0.0
        for free in self._free:
            coded, nbytes = free.held
            held |= _by_name(free, coded, [planned[tensor.name] for tensor in free.tensors])
            counted += nbytes
        return self._choices.nbytes(self._contents(self._all_stored(held), DEFAULT_DAMAGE)) - round(counted)

    def _nbytes(self, choice: Choice) -> int:
        """The size of the file, from rounding and coding every tensor where that decides it."""
        if self._choices.exact:
            return round(choice.nbytes + self._overhead)
        return self._choices.nbytes(self._contents(self._stored(choice), choice.damage))

    def _contents(self, stored: Sequence[Stored], damage: float) -> Contents:
        activations = self._activations(self._candidates(stored), damage)
        return Contents(tuple(stored), activations, provenance(self._conf, self._seen), self._states)

    def _candidates(self, stored: Sequence[Stored]) -> list[Candidate]:
        return find_candidates(self._model_tensors.model, stored, self._seen.inputs if self._seen else None)

    def _activations(self, candidates: Sequence[Candidate], damage: float) -> dict[str, Activation]:
        """How inputs are treated, by module name, where the weights do this damage."""
        share = self._activation_share
        unlimited = self._obey and self._conf.approach != "auto"
        budget = math.inf if unlimited else damage * share / (1 - share)
        return choose_activations(candidates, self._conf.approach, self._noise, budget)

    def build(self, point: OperatingPoint) -> ModuleT_co:
        """The quantized model at an operating point.

        Layers that may run in int8 do: which kernels are fastest is not part of what is scored, so that the same search
        gives the same file on a busy machine.
        """
        contents = self._contents(self._stored(point.choice), point.choice.damage)
        return quantized.assemble(self._model_tensors, contents, Profile(this_machine()))

    def nbytes_of(self, point: OperatingPoint, model: ModuleT_co) -> int:  # type: ignore[misc]  # it has made the model
        """The size of the file of a model that it has made at an operating point."""
        return point.nbytes if self._choices.exact else quantized.nbytes(model)

    def contributors(self, point: OperatingPoint) -> list[tuple[str, float]]:
        """Tensors and inputs with their shares of the damage, the largest first; the shares add up to 1."""
        choice = point.choice
        damages = {name_of(free): float(free.options.damage[option]) for free, option in self._chosen(choice)}
        candidates = self._candidates(self._stored(choice))
        activations = self._activations(candidates, choice.damage)
        for candidate in candidates:
            activation, noise = activations.get(candidate.name), candidate.noise(self._noise)
            if activation is not None and noise is not None and activation.mode != "gather":
                damages[f"{candidate.name} (input, {activation.mode})"] = noise.cost(activation)
        total = sum(damages.values()) or 1.0
        shares = [(name, damage / total) for name, damage in damages.items()]
        return sorted(shares, key=lambda pair: -pair[1])


def provenance(conf: PostTrainingQuantConfig, seen: Statistics | None) -> dict[str, str | int]:
    """Where a model comes from: plain data for its artifact."""
    return {
        "pared": __version__,
        "torch": str(torch.__version__),
        "calibration_samples": seen.samples if seen else 0,
        "seed": conf.seed,
        "approach": conf.approach,
        **({} if conf.target == OWN else {"target": conf.target}),
    }


def _by_name(free: Free, coded: Sequence[Coded], decisions: Sequence[Decision]) -> dict[str, tuple[Coded, Decision]]:
    return {tensor.name: (one, decision) for tensor, one, decision in zip(free.tensors, coded, decisions, strict=True)}
