"""What came of a search: the models it tried, how it ended, and the trade-off between bytes, damage and score."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pared.errors import CorruptError
from pared.terminal import table


@dataclass(frozen=True)
class Confirmation:
    """The result on data that the search has not seen.

    Args:
        score: the score of the quantized model.
        baseline: the score of the float model.
        loss: in the unit of the criterion's tolerable loss.
        standard_error: the standard error of the loss, paired over samples; None where the score was a single number.
    """

    score: float
    baseline: float
    loss: float
    standard_error: float | None = None


@dataclass(frozen=True)
class Trial:
    """One model that was built and evaluated.

    Args:
        price: damage per byte at which its plan is optimal.
        damage: predicted: the expected share of the output's energy that is lost.
        nbytes: the size of its `best_model.pt`.
        score: what `eval_func` gave.
        loss: in the unit of the criterion's tolerable loss; negative for a gain.
        met: whether the criterion was met, on unseen data too where there are any.
        seconds: the time of building and evaluating.
        standard_error: the standard error of the loss, paired over samples; None where the score was a single number.
        unseen: the result on data that the search has not seen, where there are any.
    """

    price: float
    damage: float
    nbytes: int
    score: float
    loss: float
    met: bool
    seconds: float
    standard_error: float | None = None
    unseen: Confirmation | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """The inverse of `dataclasses.asdict`.

        Raises:
            TypeError: a field is missing, there is one too many, or one is not the number that it should be.

        >>> trial = Trial(1e-9, 1e-3, 500, 0.9, 0.1, True, 2.0, 0.01, Confirmation(0.9, 1.0, 0.1))
        >>> Trial.from_json(asdict(trial)) == trial
        True
        """
        unseen = data.get("unseen")
        found = cls(**{**data, "unseen": Confirmation(**unseen) if unseen else None})
        _check_figures(found.price, found.damage, found.nbytes, found.score, found.loss, found.seconds)
        _check_figures(found.standard_error, *_figures(found.unseen), optional=True)
        if type(found.met) is not bool or min(found.damage, found.nbytes) < 0:
            raise TypeError("met is neither true nor false, or a size is negative")
        return found


@dataclass(frozen=True)
class Damage:
    """What a model loses, as predicted and as measured on recorded calls: shares of the outputs' energy.

    Args:
        predicted: by the plan, int8 inputs included; None without calibration data.
        measured: the mean over the outputs that can be compared, infinite where one is not finite or a call fails;
            None if nothing could be measured.
        outputs: the measured share of each output, by its name.
        calls: the number of calibration calls that were repeated.
        notes: what could not be compared, what was refined, and what could not be repaired.
    """

    predicted: float | None = None
    measured: float | None = None
    outputs: tuple[tuple[str, float], ...] = ()
    calls: int = 0
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> tuple[str, float] | None:
        """The output that loses most, and the share that it loses; None if nothing was measured."""
        return max(self.outputs, key=lambda output: output[1], default=None)

    def lines(self) -> list[str]:
        """The figures in words, then the notes.

        >>> Damage(1e-3, 9e-4, (("logits", 1e-3), ("boxes", 8e-4)), 3).lines()
        ['damage: predicted 0.001, measured 0.0009 on 3 calls (most in logits: 0.001)']
        """
        found = [] if self.predicted is None else [f"predicted {self.predicted:.2g}"]
        if self.measured is not None:
            calls = "1 call" if self.calls == 1 else f"{self.calls} calls"
            found.append(f"measured {self.measured:.2g} on {calls}")
        elif not self.notes:
            return []
        most = f" (most in {self.worst[0]}: {self.worst[1]:.2g})" if self.worst and len(self.outputs) > 1 else ""
        return [f"damage: {', '.join(found) or 'not measured'}{most}", *self.notes]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Damage:
        """The inverse of `dataclasses.asdict`."""
        outputs = tuple((str(name), float(share)) for name, share in data["outputs"])
        return cls(**{**data, "outputs": outputs, "notes": tuple(data["notes"])})


_NOT_KEPT = ("trials", "contributors", "damage")


@dataclass(frozen=True)
class Outcome:
    """How the search went.

    Args:
        met: whether the criterion was met; None if nothing was evaluated.
        score: the score of the returned model.
        baseline: the score of the float model.
        gap: by how much the tolerable loss was exceeded; 0 if it was met.
        confirmation: on unseen data, where there were any.
        trials: every model that was evaluated, in order.
        contributors: if the criterion is not met, the tensors and inputs that do most of the damage, each with its
            share of it.
        damage: what the model loses, as predicted and as measured; None after loading.
    """

    met: bool | None = None
    score: float | None = None
    baseline: float | None = None
    gap: float | None = None
    confirmation: Confirmation | None = None
    trials: tuple[Trial, ...] = ()
    contributors: tuple[tuple[str, float], ...] = ()
    damage: Damage | None = field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        """What an artifact keeps: no trials, whose seconds depend on a clock; no damage, which depends on a machine."""
        return {key: value for key, value in asdict(self).items() if value is not None and key not in _NOT_KEPT}

    @classmethod
    def from_state(cls, data: Mapping[str, Any]) -> Outcome:
        """The inverse of `dataclasses.asdict`, after JSON: with trials and contributors, which `to_json` leaves out.

        >>> trial = Trial(1e-9, 1e-3, 500, 0.9, 0.1, True, 2.0)
        >>> outcome = Outcome(True, 0.9, trials=(trial,), contributors=(("a", 0.5),))
        >>> Outcome.from_state(asdict(outcome)) == outcome
        True
        """
        plain = {key: value for key, value in data.items() if key not in _NOT_KEPT}
        trials = tuple(Trial.from_json(trial) for trial in data["trials"])
        contributors = tuple((name, share) for name, share in data["contributors"])
        damage = Damage.from_json(data["damage"]) if data.get("damage") else None
        return replace(cls.from_json(plain), trials=trials, contributors=contributors, damage=damage)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """The inverse of `to_json`.

        Raises:
            CorruptError: the data are not what `to_json` gives.
        """
        try:
            confirmation = data.get("confirmation")
            found = cls(**{**data, "confirmation": Confirmation(**confirmation) if confirmation else None})
            _check_numbers(found)
        except (TypeError, AttributeError) as error:
            raise CorruptError(f"the recorded outcome makes no sense ({error})") from error
        return found


def _check_numbers(outcome: Outcome) -> None:
    """Raise TypeError where a file has something other than a number, true or false."""
    if outcome.trials or outcome.contributors or outcome.damage:
        raise TypeError("it holds trials, contributors or a damage, which an artifact does not record")
    if outcome.met not in (None, True, False):
        raise TypeError("met is neither true nor false")
    _check_figures(outcome.score, outcome.baseline, outcome.gap, *_figures(outcome.confirmation), optional=True)


def _figures(seen: Confirmation | None) -> tuple[float | None, ...]:
    if seen is None:
        return ()
    _check_figures(seen.score, seen.baseline, seen.loss)
    return (seen.standard_error,)


def _check_figures(*values: object, optional: bool = False) -> None:
    """Raise TypeError where a file has something other than a finite number, or nothing where that may be."""
    for value in values:
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, float | int) or not abs(value) <= sys.float_info.max:
            raise TypeError("one of its figures is not a finite number")


@dataclass(frozen=True)
class Point:
    """One model of the curve.

    Args:
        price: the damage per byte at which its plan is optimal.
        damage: predicted: the expected share of the output's energy that is lost.
        nbytes: of `best_model.pt`: planned; of the file itself where the model was built for its score.
        score: None where nothing was evaluated.
        seconds: the time of building and evaluating.
    """

    price: float
    damage: float
    nbytes: int
    score: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Curve:
    """Points from the largest file to the smallest.

    Args:
        points: at least one.
        baseline: the score of the float model; None where nothing was evaluated.

    >>> print(Curve((Point(1e-9, 1e-4, 2_000_000), Point(1e-8, 1e-3, 1_500_000))))
         bytes  damage  damage/byte  score  seconds
     ──────────────────────────────────────────────
     2,000,000  0.0001        1e-09             0.0
     1,500,000   0.001        1e-08             0.0
    """

    points: tuple[Point, ...]
    baseline: float | None = None

    def __str__(self) -> str:
        """A table, a line per point."""
        headings = ["bytes", "damage", "damage/byte", "score", "seconds"]
        rows = [
            [f"{p.nbytes:,}", f"{p.damage:.3g}", f"{p.price:.3g}", _score(p.score), f"{p.seconds:.1f}"]
            for p in self.points
        ]
        if self.baseline is not None:
            rows.append(["float model", "0", "", _score(self.baseline), ""])
        return "\n".join(table(headings, rows)[1:-1])

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `json.dumps`."""
        return {"baseline": self.baseline, "points": [asdict(point) for point in self.points]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Curve:
        """The inverse of `to_json`.

        >>> curve = Curve((Point(1e-9, 1e-4, 2_000_000, 0.5),), 0.6)
        >>> Curve.from_json(curve.to_json()) == curve
        True
        """
        return cls(tuple(Point(**point) for point in data["points"]), data["baseline"])

    def scored(self, outcome: Outcome) -> Curve:
        """With the models that a search has scored."""
        trials = [Point(t.price, t.damage, t.nbytes, t.score, t.seconds) for t in outcome.trials]
        return Curve(tuple(sorted((*self.points, *trials), key=lambda point: -point.nbytes)), outcome.baseline)


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.6g}"
