"""Makes quantized models of any damage or size from one set of statistics: what the search works with."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Generic

import numpy as np
import torch

from pared.errors import ConfigError
from pared.fitting.calibration.observe import Statistics
from pared.fitting.calibration.sensitivity import Sensitivity, TensorStats
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.rounding import encoding, plan
from pared.fitting.rounding.importance import unreached
from pared import allocate
from pared.fitting.search.activations import Candidate, choose_activations, find_candidates
from pared.allocate import Choice
from pared.fitting.search.free.on_grids import GRID_ENTRY, FreeTensor, corrected, rounded, trace_tensor
from pared.formats.activation import Activation
from pared.formats.coded import Coded, Grid
from pared.formats.views import View
from pared.model import storage
from pared.model.contents import Contents, Decision, Plan, Stored
from pared.model.state import extra
from pared.model.tensors import ModelTensor, ModelTensors, ModuleT_co
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

# Total importance (damage at a relative error of 1): no tensor's is below this share of the median tensor's, so that
# what calibration hardly touches is not wiped out ...
_MIN_SHARE_OF_MEDIAN: Final = 0.01
# ... and the median itself is capped: such errors are too large for damage to be quadratic in them.
_MAX_MEDIAN: Final = 10.0

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
        self._plan: Plan = plan.make_plan(model_tensors, conf.rules, bits=None, strict=conf.strict)
        self._fixed = {
            model_tensor.name: encoding.encode(model_tensor, decision)
            for model_tensor, decision in zip(model_tensors, self._plan, strict=True)
            if not _is_free(decision)
        }
        free = [
            model_tensor for model_tensor, decision in zip(model_tensors, self._plan, strict=True) if _is_free(decision)
        ]
        measured = sensitivity.tensors if sensitivity else {}
        stats = _complete(free, measured)
        fine = conf.quant_level == 0
        self._free = [
            trace_tensor(
                model_tensor,
                stats[model_tensor.name],
                strict=conf.strict,
                fine=fine,
                because=unreached(model_tensor, measured.get(model_tensor.name)) if sensitivity else "",
            )
            for model_tensor in free
        ]
        self._rounded: dict[tuple[str, int], Coded] = {}  # the last model's tensors, by name and option
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
        other._free = [
            corrected(free, factors[free.model_tensor.name], strict=self._conf.strict)
            if free.model_tensor.name in factors
            else free
            for free in self._free
        ]
        other._rounded, other._inputs = dict(self._rounded), inputs
        other._set_ends()
        return other

    def _set_ends(self) -> None:
        self._options = allocate.Table([tensor.options for tensor in self._free])
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

    def _chosen(self, choice: Choice) -> list[tuple[FreeTensor, int]]:
        """The free tensors, each with its option."""
        return list(zip(self._free, choice.options, strict=True))

    def _stored(self, choice: Choice) -> list[Stored]:
        """Every tensor in its format. Tensors that keep the option of the last call are not rounded again."""
        chosen = {tensor.model_tensor.name: (tensor, option) for tensor, option in self._chosen(choice)}
        earlier, self._rounded = self._rounded, {}
        stored = []
        for model_tensor, decision in zip(self._model_tensors, self._plan, strict=True):
            if model_tensor.name not in chosen:
                stored.append(Stored(model_tensor.names, model_tensor.kind, self._fixed[model_tensor.name], decision))
                continue
            tensor, option = chosen[model_tensor.name]
            coded = earlier.get((model_tensor.name, option)) or rounded(tensor, option)
            self._rounded[model_tensor.name, option] = coded
            stored.append(Stored(model_tensor.names, model_tensor.kind, coded, tensor.decision(option)))
        return stored

    def _measure_overhead(self) -> int:
        """Bytes of a file beside the numbers of its free tensors, from writing one in which these are all zero."""
        zeros = {tensor.model_tensor.name: _zeros(tensor.model_tensor, tensor.target.view) for tensor in self._free}
        stored = [
            Stored(
                model_tensor.names,
                model_tensor.kind,
                zeros.get(model_tensor.name) or self._fixed[model_tensor.name],
                decision,
            )
            for model_tensor, decision in zip(self._model_tensors, self._plan, strict=True)
        ]
        file = len(storage.to_bytes(self._contents(stored, DEFAULT_DAMAGE)))
        return file - sum(coded.nbytes for coded in zeros.values()) - GRID_ENTRY * len(zeros)

    def _nbytes(self, choice: Choice) -> int:
        """The size of the file, from rounding and coding every tensor."""
        return len(storage.to_bytes(self._contents(self._stored(choice), choice.damage)))

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

    def contributors(self, point: OperatingPoint) -> list[tuple[str, float]]:
        """Tensors and inputs with their shares of the damage, the largest first; the shares add up to 1."""
        choice = point.choice
        damages = {
            tensor.model_tensor.name: float(tensor.options.damage[option]) for tensor, option in self._chosen(choice)
        }
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
    }


def _is_free(decision: Decision) -> bool:
    """Whether the search decides the tensor's step."""
    return decision.treatment == "grid" and decision.bits is None


def _complete(model_tensors: Sequence[ModelTensor], known: Mapping[str, TensorStats]) -> dict[str, TensorStats]:
    """Statistics of every tensor, by name.

    A tensor on which no output was seen to depend counts like the median one at the same relative error.
    """
    energies = {
        model_tensor.name: float(model_tensor.tensor.detach().float().square().mean()) or 1.0
        for model_tensor in model_tensors
    }
    totals = {name: float(stats.rows.sum()) * energies[name] for name, stats in known.items() if name in energies}
    positive = [total for total in totals.values() if 0 < total < math.inf]
    median = min(float(np.median(positive)), _MAX_MEDIAN) if positive else 1.0 / max(1, len(model_tensors))
    completed = {}
    for model_tensor in model_tensors:
        stats, total = known.get(model_tensor.name), totals.get(model_tensor.name, 0.0)
        if stats is None or not 0 < total < math.inf:
            rows = model_tensor.view.n_rows
            stats = TensorStats(torch.full((rows,), median / energies[model_tensor.name] / rows, dtype=torch.float64))
        elif total < _MIN_SHARE_OF_MEDIAN * median:
            stats = replace(stats, rows=stats.rows * (_MIN_SHARE_OF_MEDIAN * median / total))
        completed[model_tensor.name] = stats
    return completed


def _zeros(model_tensor: ModelTensor, view: View) -> Coded:
    shape = tuple(model_tensor.tensor.shape)
    parts = {"codes": torch.zeros(shape, dtype=torch.int8), "step": torch.ones(view.row_sizes)}
    return Coded(Grid("int8"), shape, model_tensor.tensor.dtype, parts, view)
