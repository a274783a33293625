"""Makes quantized models of any damage or size from one set of statistics: what the search works with."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final, Generic

import torch
from torch import nn

from pared import allocate
from pared.allocate import Choice
from pared.artifact.outcome import Outcome
from pared.errors import ConfigError
from pared.fitting.calibration.observe import Statistics
from pared.fitting.calibration.sensitivity import Sensitivity
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.search.activations import Candidate, choose_activations, find_candidates
from pared.fitting.search.closing import closed_in
from pared.fitting.search.free.choices import choices_for
from pared.fitting.search.free.free import Free, name_of
from pared.fitting.search.maker import OperatingPoint
from pared.formats.activation import Activation
from pared.formats.coded import Coded
from pared.model import storage
from pared.model.contents import Contents, Decision, Stored
from pared.model.copies import shadow
from pared.model.state import extra
from pared.model.tensors import ModelTensors, ModuleT
from pared.runtime import quantized, saving
from pared.runtime.profile.profile import Profile, profile_beside, this_machine
from pared.runtime.record import set_outcome
from pared.targets.table import OWN
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

_FEWER_RULES: Final = "Allow more bytes, or give fewer rules that keep tensors in float."
_LESS_THAN_EIGHT: Final = (
    'quant_level=0 allows nothing coarser than 8 bits: allow more bytes, or take quant_level="auto".'
)


class Compressor(Generic[ModuleT]):
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
        model_tensors: ModelTensors[ModuleT],
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

    def corrected(self, factors: Mapping[str, float], inputs: float) -> Compressor[ModuleT]:
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
        best = closed_in(self._options, nbytes - reserve, self._overhead, self._nbytes)
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
        return Contents(
            tuple(stored), activations, provenance(self._conf, self._seen.samples if self._seen else 0), self._states
        )

    def _candidates(self, stored: Sequence[Stored]) -> list[Candidate]:
        return find_candidates(self._model_tensors.model, stored, self._seen.inputs if self._seen else None)

    def _activations(self, candidates: Sequence[Candidate], damage: float) -> dict[str, Activation]:
        """How inputs are treated, by module name, where the weights do this damage."""
        share = self._activation_share
        unlimited = self._obey and self._conf.approach != "auto"
        budget = math.inf if unlimited else damage * share / (1 - share)
        return choose_activations(candidates, self._conf.approach, self._noise, budget)

    def build(self, point: OperatingPoint) -> ModuleT:
        """The quantized model at an operating point.

        Layers that may run in int8 do: which kernels are fastest is not part of what is scored, so that the same search
        gives the same file on a busy machine.
        """
        contents = self._contents(self._stored(point.choice), point.choice.damage)
        return quantized.assemble(self._model_tensors, contents, Profile(this_machine()))

    def nbytes_of(self, point: OperatingPoint, made: ModuleT) -> int:
        """See `Maker`; so are the other methods here."""
        return point.nbytes if self._choices.exact else quantized.nbytes(made)

    def original(self) -> AbstractContextManager[nn.Module]:
        """A copy that shares the weights."""
        return nullcontext(shadow(self._model_tensors.model))

    def candidate(self, made: ModuleT) -> AbstractContextManager[nn.Module]:
        """A copy."""
        return nullcontext(copy.deepcopy(made))

    def told(self, made: ModuleT, outcome: Outcome) -> ModuleT:
        """The model itself."""
        set_outcome(made, outcome)
        return made

    def save(self, made: ModuleT, directory: Path) -> Path:
        """Write an artifact with its profile."""
        return saving.save(made, directory)

    def read(self, file: Path) -> ModuleT:
        """Read them."""
        return quantized.assemble(self._model_tensors, storage.read(file), profile_beside(file))

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


def provenance(conf: PostTrainingQuantConfig, samples: int) -> dict[str, str | int]:
    """Where a model comes from: plain data for its artifact."""
    return {
        "pared": __version__,
        "torch": str(torch.__version__),
        "calibration_samples": samples,
        "seed": conf.seed,
        "approach": conf.approach,
        **({} if conf.target == OWN else {"target": conf.target}),
    }


def _by_name(free: Free, coded: Sequence[Coded], decisions: Sequence[Decision]) -> dict[str, tuple[Coded, Decision]]:
    return {tensor.name: (one, decision) for tensor, one, decision in zip(free.tensors, coded, decisions, strict=True)}
