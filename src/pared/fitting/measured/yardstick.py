"""Measures the damage of a quantized model on recorded calls, by the measure in which it is predicted."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from pared.artifact.outcome import Damage
from pared.errors import reason_of
from pared.fitting.calibration.observe import Statistics
from pared.fitting.calibration.perturbation import values_of
from pared.model.calls import Call
from pared.model.copies import shadow
from pared.model.outputs import Key, Leaf, share_of_each
from pared.model.recorded import draws
from pared.switches import WITHOUT_FAST_PATHS

MOST_CALLS: Final = 3  # that are repeated: the first, the last and one in the middle ...
_ENOUGH_SAMPLES: Final = 24  # ... or fewer if they have as many samples
_MOST_NUMBERS: Final = 1 << 26  # of the outputs that are kept; of one call at least


@dataclass(frozen=True, eq=False)
class _Expected:
    """A call, and the float model's outputs."""

    call: Call
    leaves: Sequence[Leaf]


class Yardstick:
    """Measures damage on a few of the recorded calls. Models that draw random numbers draw the same ones.

    Args:
        model: the float model, which is left as it is.
        seen: what calibration saw.
        seed: the seed of the random numbers.
    """

    def __init__(self, model: nn.Module, seen: Statistics, seed: int) -> None:
        self._model, self._seed, self._logits = model, seed, seen.logits
        self._expected: list[_Expected] = []
        places = sorted({0, len(seen.calls) // 2, len(seen.calls) - 1})
        self.in_floats, self._failure = bool(seen.energies), ""
        places = _with_enough(places[:MOST_CALLS], seen.samples_of_calls, seen.calls)
        try:
            if seen.outputs_of_calls:  # the copy that was called then is like this one
                kept = [
                    [leaf for leaf in found if not leaf.is_logits or leaf.path in seen.logits]
                    for found in seen.outputs_of_calls
                ]
                self._expected = [_Expected(seen.calls[place], kept[place]) for place in places]
            else:
                self._repeat([seen.calls[place] for place in places])
        except Exception as error:  # noqa: BLE001  # whatever the model raises: then nothing can be compared
            self._failure = _unrepeatable(error)
        self.rest()

    @functools.cached_property
    def _copy(self) -> nn.Module:
        """A copy of the float model, which is called and in which weights are exchanged."""
        return shadow(self._model)

    def rest(self) -> None:
        """Free the copy of the model, which is made again where it is needed again."""
        vars(self).pop("_copy", None)

    def _repeat(self, calls: Sequence[Call]) -> None:
        """Keep the float model's outputs for these calls, or for the first of them if they are large."""
        left = _MOST_NUMBERS
        for call in calls:
            leaves = self._outputs(self._copy, call)
            left -= sum(leaf.value.numel() for leaf in leaves)
            if left < 0 and self._expected:
                break
            self._expected.append(_Expected(call, leaves))

    def damage_of(self, model: nn.Module, most: int = MOST_CALLS) -> Damage:
        """The damage that a model does on these calls; infinite where an output is not finite or a call fails.

        Args:
            model: it is called.
            most: how many of the calls are repeated.

        Returns:
            without a prediction; `measured` is None where no output can be compared, and `notes` say why.
        """
        if self._failure:
            return Damage(notes=(self._failure,))
        lost: dict[Key, float] = {}
        total: dict[Key, float] = {}
        notes: dict[str, None] = {}
        repeated = self._expected[:most]
        for expected in repeated:
            try:
                got = {leaf.key: leaf.value for leaf in self._outputs(model, expected.call)}
            except Exception as error:  # noqa: BLE001  # whatever the model raises is what is found
                if self._cannot_repeat(expected.call):
                    return Damage(notes=(self._failure,))
                note = f"a recorded call fails in the result: {reason_of(error)}"
                return Damage(None, math.inf, calls=len(repeated), notes=(note,))
            for leaf in expected.leaves:
                theirs = got.get(leaf.key)
                if theirs is None or theirs.shape != leaf.value.shape:
                    shape = "nothing" if theirs is None else f"the shape {tuple(theirs.shape)}"
                    notes[f"{leaf.path} cannot be compared: {shape} in place of {tuple(leaf.value.shape)}"] = None
                    continue
                lost[leaf.key] = lost.get(leaf.key, 0.0) + _error(leaf, theirs)
                total[leaf.key] = total.get(leaf.key, 0.0) + _energy(leaf)
        outputs: dict[str, float] = {}
        for key, energy_lost in lost.items():
            share = energy_lost / (total[key] or 1.0)
            name = f"{key[0]} ({key[2]})" if key[2] else key[0]
            outputs[name] = outputs.get(name, 0.0) + (share if math.isfinite(share) else math.inf)
        measured = sum(outputs.values()) * share_of_each(lost) if outputs else None
        return Damage(None, measured, tuple(outputs.items()), len(repeated), tuple(notes)[:3])

    def _cannot_repeat(self, call: Call) -> bool:
        """Whether the float model itself fails at a call that it took before; then `_failure` says so."""
        try:
            self._outputs(shadow(self._model), call)  # the weights of the copy may be others now
        except Exception as error:  # noqa: BLE001  # whatever the model raises: then nothing can be compared
            self._failure = _unrepeatable(error)
        return bool(self._failure)

    def with_weights(self, values: Mapping[str, Tensor]) -> float:
        """The damage on the first call while some tensors of the float model, by name, have other values.

        It is infinite where the call fails then, and 0 where no output can be compared.
        """
        known = {**dict(self._copy.named_parameters()), **dict(self._copy.named_buffers())}
        own = {name: known[name].detach().clone() for name in values}
        with torch.no_grad():
            try:
                for name, value in values.items():
                    known[name].copy_(value)
                found = self.damage_of(self._copy, 1).measured
            finally:  # Ctrl-C comes at any time
                for name, value in own.items():
                    known[name].copy_(value)
        return 0.0 if found is None else found

    def varies(self) -> bool:
        """Whether the float model itself gives other outputs for the same call."""
        found = self.damage_of(self._copy, 1)
        return found.measured is None or not found.measured < 1e-9 or bool(found.notes)

    def _outputs(self, model: nn.Module, call: Call) -> list[Leaf]:
        with torch.no_grad(), WITHOUT_FAST_PATHS, draws.alike(self._seed):
            return values_of(model, call, self._logits)


def _error(ours: Leaf, theirs: Tensor) -> float:
    if ours.value.is_floating_point():
        return ours.error(theirs)
    return float((ours.value != theirs).sum())


def _energy(leaf: Leaf) -> float:
    return leaf.energy() if leaf.value.is_floating_point() else float(leaf.value.numel())


def _unrepeatable(error: Exception) -> str:
    return f"no damage was measured: a recorded call cannot be repeated: {reason_of(error)}"


def _with_enough(places: Sequence[int], samples: Sequence[int], calls: Sequence[Call]) -> list[int]:
    """The first of these places whose calls have enough samples together, and the first call of each other task."""
    found: list[int] = []
    for one in places:
        tasks = {calls[place].task for place in found}
        if sum(samples[place] for place in found) < _ENOUGH_SAMPLES or calls[one].task not in tasks:
            found.append(one)
    return found
