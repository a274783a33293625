"""Finds out which tensors do far more damage than predicted, and has them refined."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Generic

from pared.artifact.outcome import Damage
from pared.fitting.calibration.observe import Statistics
from pared.fitting.calibration.sensitivity import Sensitivity
from pared.fitting.measured import prediction
from pared.fitting.measured.yardstick import Yardstick
from pared.model.contents import Contents, Stored
from pared.model.tensors import ModelTensors, ModuleT
from pared.runtime.record import contents_of

log = logging.getLogger(__name__)

# Far beyond the prediction: this many times it (decision 024) ...
FACTOR: Final = 3.0
# ... and nothing is far beyond that does less damage than this, the damage that `fit` promises where nothing is asked.
TOLERABLE: Final = 1e-3
# Refinements, runs of one call to find the tensors, and by how much a tensor counts more if it breaks the output.
_ROUNDS: Final = 4
_RUNS: Final = 64
_BROKEN: Final = 4.0**5
_MOST_SHOWN: Final = 3


@dataclass(frozen=True)
class Corrections:
    """What measurement has taught about predictions.

    Args:
        factors: how much more damage a tensor does than was predicted, by its first name.
        inputs: the share of the damage allowed for int8 inputs that they still may do, from 1 to 0.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    inputs: float = 1.0

    def raised(self, factors: Mapping[str, float]) -> Corrections:
        """With these factors in addition."""
        raised = {name: self.factors.get(name, 1.0) * factor for name, factor in factors.items()}
        return replace(self, factors={**self.factors, **raised})


@dataclass(frozen=True, eq=False)
class Refiner(Generic[ModuleT]):
    """Measures what `make` makes, and has it made again with corrections where that is far from the prediction.

    Args:
        tensors: those of the float model.
        seen: what calibration saw.
        sensitivity: what errors cost.
        yardstick: measures damage.
        may_keep_inputs: whether inputs of layers may stay in float; False where the user asked for an approach.
    """

    tensors: ModelTensors[ModuleT]
    seen: Statistics
    sensitivity: Sensitivity
    yardstick: Yardstick
    may_keep_inputs: bool = True

    def predicted(self, contents: Contents) -> float:
        """The damage that is predicted of a result."""
        weights = prediction.of_weights(self.tensors, contents, self.sensitivity)
        inputs = prediction.of_inputs(self.tensors, contents, self.seen, self.sensitivity)
        return sum(damage for _, damage in weights) + inputs

    def damage_of(self, model: ModuleT) -> Damage:
        """The predicted and the measured damage of a result, which is called, and may be changed by that."""
        predicted = self.predicted(contents_of(model)) if self.yardstick.in_floats else None
        return replace(self.yardstick.damage_of(model), predicted=predicted)

    def repaired(
        self, make: Callable[[Corrections], ModuleT], most_of_output: float = math.inf, *, scored: bool = False
    ) -> tuple[ModuleT, Corrections]:
        """What `make` makes, with the corrections after which its damage is near the predicted one, if there are such.

        Args:
            make: makes the model, given corrections of the predictions.
            most_of_output: the most that int8 inputs may make an output lose.
            scored: a score will decide about damage, so that only outputs that are not finite are repaired.
        """
        corrections = Corrections()
        model = make(corrections)
        for _ in range(_ROUNDS):
            found = self.damage_of(copy.deepcopy(model))
            contents = contents_of(model)
            if scored and (found.measured is None or math.isfinite(found.measured)):
                break
            better = self._better(found, contents, corrections, most_of_output)
            if better is None:
                break
            log.debug("measured %s, predicted %s: made again with %s", found.measured, found.predicted, better)
            corrections = better
            model = make(corrections)
        self.yardstick.rest()
        return model, corrections

    def _better(
        self, found: Damage, contents: Contents, known: Corrections, most_of_output: float
    ) -> Corrections | None:
        """What should be corrected; None if nothing must or can be."""
        if found.predicted is None or found.measured is None:
            return None
        far = is_far(found)
        worst = found.worst[1] if found.worst else 0.0
        if not far and worst <= most_of_output:
            return None
        if self.yardstick.varies():
            return None  # of the model's own draws
        weights = list(prediction.of_weights(self.tensors, contents, self.sensitivity))
        alone = self._lost([stored for stored, _ in weights])
        predicted = sum(damage for _, damage in weights)
        if _is_far(alone, predicted):
            return self._refined(weights, known)
        if not far and alone > TOLERABLE:
            return None
        if contents.activations and known.inputs > 0 and self.may_keep_inputs:
            return replace(known, inputs=known.inputs / 4 if known.inputs > 0.1 else 0.0)
        return None

    def _refined(self, weights: Sequence[tuple[Stored, float]], known: Corrections) -> Corrections | None:
        """With more weight for the tensors that do more damage than predicted, found by halving groups of them."""
        groups = [list(weights)]
        runs, together, factors = 0, 0.0, dict[str, float]()
        while groups:
            group = groups.pop(0)
            runs += 1
            measured, predicted = self._lost([stored for stored, _ in group]), sum(damage for _, damage in group)
            excess = measured / max(predicted, TOLERABLE / 100) if math.isfinite(measured) else _BROKEN
            together = together or excess  # the first group is all of them
            if excess < FACTOR / 1.5:
                continue
            if len(group) > 1 and runs + len(groups) + 2 <= _RUNS:
                groups += [group[: len(group) // 2], group[len(group) // 2 :]]
            else:
                factors |= {stored.name: min(excess, _BROKEN) for stored, _ in group}
        if not factors:  # only together do they do so much
            factors = {stored.name: min(together, FACTOR**2) for stored, _ in weights}
        return known.raised(factors)

    def _lost(self, tensors: Sequence[Stored]) -> float:
        return self.yardstick.with_weights({stored.name: stored.coded.decode() for stored in tensors})


def is_far(found: Damage) -> bool:
    """Whether the measured damage is far beyond the predicted one."""
    return found.measured is not None and found.predicted is not None and _is_far(found.measured, found.predicted)


def _is_far(measured: float, predicted: float) -> bool:
    return not measured <= max(FACTOR * predicted, TOLERABLE)


def reported(found: Damage, corrections: Corrections) -> Damage:
    """The damage with what was done, and what was not; this is one warning."""
    notes = []
    if corrections.factors:
        names = list(corrections.factors)
        more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
        notes.append(
            f"stored more finely, as they did more damage than predicted: {', '.join(names[:_MOST_SHOWN])}{more}"
        )
    if corrections.inputs < 1:
        fewer = "fewer inputs are" if corrections.inputs > 0 else "no inputs are"
        notes.append(f"{fewer} rounded to int8, as that did more damage than predicted")
    found = replace(found, notes=(*found.notes, *notes))
    trouble = ""
    if found.measured == math.inf and not found.outputs:
        trouble = found.notes[0]  # a call fails
    elif found.measured is not None and not math.isfinite(found.measured):
        trouble = "an output of the result is not finite on the calibration data"
    elif is_far(found):
        trouble = "the damage on the calibration data is far beyond the predicted one"
    elif found.measured is None and found.calls == 0 and found.notes:
        trouble = found.notes[0]
    if trouble:
        log.warning("%s: measured %s, predicted %s", trouble, found.measured, found.predicted)
    if trouble and trouble not in found.notes:
        found = replace(found, notes=(*found.notes, trouble))
    return found
