"""The search: root finding on one number, the damage, for the smallest model that meets the accuracy criterion.

Loss is taken for `c * damage ** slope`. Trials fix `c` and `slope`, and bracket the answer: what meets, and what fails.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar, cast

import numpy as np
from torch import nn

from pared.artifact.outcome import Outcome, Trial
from pared.fitting.config import AccuracyCriterion
from pared.fitting.search.compressor import DEFAULT_DAMAGE, Compressor, Offer
from pared.fitting.search.evaluate import EvalFunc, Score, compare, confirm, evaluate, strain
from pared.fitting.search.workspace import Workspace
from pared.runtime import quantized
from pared.runtime.record import set_outcome

log = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# The aim lies below the tolerable loss, so that what the fit gets wrong does not turn into a failed trial; with noise,
# by one standard error, down to half of it. A model that comes this close to the aim is good enough.
_AIM: Final = 0.92
_LEAST_AIM: Final = 0.5
_CLOSE: Final = 0.85

# After one trial, the next must promise to make the file smaller by this share; by more after each further one; and by
# more where the score is noisy, by this factor for a standard error as large as the tolerable loss.
_WORTH: Final = 0.01
_WORTH_GROWTH: Final = 1.5
_WORTH_OF_NOISE: Final = 4.0

# Slopes that are believed, and factors of damage: the boldest step to where nothing is known yet, the step where the
# loss is lost in noise, and the least step down from a failure (it doubles, on a log scale, with each failure).
_SLOPES: Final = (0.3, 3.0)
_BOLDEST: Final = math.log(10)
_BOLD: Final = math.log(8)
_LEAST_STEP: Final = math.log(1.25)
_LEAST_STEP_UP: Final = math.log(1.6)
_PATIENCE: Final = 4

# How far a measured log loss lies from the law: a little near the aim, and a share of the distance far from it.
_NEAR: Final = 0.03
_FAR: Final = 0.25

_BLAMED: Final = 5


@dataclass(frozen=True)
class Judge:
    """Who decides whether a model is good enough.

    Args:
        criterion: how much may be lost.
        eval_func: scores a model; higher or lower is better, as the criterion says.
        confirm_func: the same on other data; None: the odd samples of `eval_func` serve, where it gives samples.
        max_trials: how many models may be scored.
        timeout: seconds after which no new trial begins; 0: no limit.
    """

    criterion: AccuracyCriterion
    eval_func: EvalFunc
    confirm_func: EvalFunc | None = None
    max_trials: int = 20
    timeout: float = 0


def search(
    compressor: Compressor[ModuleT],
    original: nn.Module,
    judge: Judge,
    *,
    max_size: int | None = None,
    workspace: Workspace | None = None,
    start: float = DEFAULT_DAMAGE,
) -> ModuleT:
    """Find the smallest model that meets the criterion, on the search's data and on unseen ones.

    Args:
        compressor: makes the models.
        original: the float model, in eval mode.
        judge: who decides.
        max_size: bytes that the file may take at most; no model larger than that is tried.
        workspace: where finished trials are recorded; those of an earlier run count as if they were made now.
        start: the damage of the first trial, where the compressor offers it.

    Returns:
        the smallest model that meets the criterion, else the one that lost least; its outcome says which. Ctrl-C at
        any time after the first trial ends the search with the best model so far.

    Raises:
        EvaluationError: a function of the judge raised, or gave no score.
        ConfigError: a relative loss of a baseline of zero.
        KeyboardInterrupt: Ctrl-C before any trial was finished.
    """
    began = time.monotonic()
    references = _References.of(original, judge, workspace)
    trials: tuple[Trial, ...] = workspace.trials if workspace is not None else ()
    market: _Market | None = None
    held: ModuleT | None = None
    try:
        finest = compressor.offer_bytes(max_size) if max_size is not None else compressor.offer(compressor.least)
        market = _Market(compressor, finest, start, judge.criterion.tolerable_loss)
        while len(trials) < judge.max_trials and not (trials and 0 < judge.timeout < time.monotonic() - began):
            offer = market.next(trials)
            if offer is None:
                break
            model, trial = _try(compressor, offer, judge, references)
            log.info("trial %d: %s", len(trials) + 1, trial)
            trials, held = (*trials, trial), (model if _best((*trials, trial)) == len(trials) else held)
            if workspace is not None:
                workspace.add(trial, model)
    except KeyboardInterrupt:
        if not trials:
            raise
        log.warning("interrupted: the best of %d trials is returned", len(trials))
    number = _best(trials)
    if held is None:
        assert workspace is not None, "without a workspace the best trial was made in this run"
        held = cast("ModuleT", _read(workspace, number, original))  # of the class of what it was made from
    outcome = replace(_outcome(trials[number], judge.criterion, references), trials=trials)
    if not outcome.met:
        outcome = replace(outcome, blame=_blame(market, trials[number]))
        log.warning("the criterion is not met: %.4g too much was lost; the best model is returned", outcome.gap)
    set_outcome(held, outcome)
    return held


def _read(workspace: Workspace, number: int, original: nn.Module) -> nn.Module:
    """The model of an earlier run's trial. Ctrl-C does not stop it: this model is what Ctrl-C asks for."""
    try:
        return workspace.model(number, original)
    except KeyboardInterrupt:
        log.warning("interrupted: the best model so far is read all the same")
        return workspace.model(number, original)


def _blame(market: _Market | None, trial: Trial) -> tuple[tuple[str, float], ...]:
    """What costs most of the damage of a trial's model; nothing where Ctrl-C came before that was known."""
    if market is None:
        return ()
    try:
        return tuple(market.compressor.blame(market.offer_of(trial)))[:_BLAMED]
    except KeyboardInterrupt:
        log.warning("interrupted: what costs most of the damage was not determined")
        return ()


@dataclass(frozen=True)
class _References:
    """What the user's functions said of the float model; `other` is the confirming function's."""

    baseline: Score
    other: Score | None

    @classmethod
    def of(cls, original: nn.Module, judge: Judge, workspace: Workspace | None) -> _References:
        """Ask the functions, or the records of an earlier run, and refuse what no criterion can be applied to."""
        baseline = _reference("eval_func", judge.eval_func, original, workspace)
        judge.criterion.loss(baseline.value, baseline.value)
        confirm(judge.criterion, baseline, baseline)
        if judge.confirm_func is None:
            return cls(baseline, None)
        other = _reference("confirm_func", judge.confirm_func, original, workspace)
        compare(judge.criterion, other, other)
        return cls(baseline, other)


def _reference(name: str, function: EvalFunc, original: nn.Module, workspace: Workspace | None) -> Score:
    known = workspace.baseline(name) if workspace is not None else None
    if known is not None:
        return known
    score = evaluate(function, original, name)
    if workspace is not None:
        workspace.set_baseline(name, score)
    return score


def _try(compressor: Compressor[ModuleT], offer: Offer, judge: Judge, references: _References) -> tuple[ModuleT, Trial]:
    """Build a model, score it, confirm the score where it would do, and write the result into the model."""
    began = time.monotonic()
    model = compressor.build(offer)
    criterion, baseline = judge.criterion, references.baseline
    candidate = copy.deepcopy(model)  # the user's functions may do with it what they like
    score = evaluate(judge.eval_func, candidate)
    unseen = confirm(criterion, score, baseline)
    met = criterion.met(score.value, baseline.value)
    if met and judge.confirm_func is not None and references.other is not None:
        unseen = compare(criterion, evaluate(judge.confirm_func, candidate, "confirm_func"), references.other)
    seen = compare(criterion, _seen(score), _seen(baseline))
    met = met and strain(seen.loss, unseen) <= criterion.tolerable_loss + 1e-12
    trial = Trial(
        price=offer.price,
        damage=offer.damage,
        nbytes=offer.nbytes,
        score=score.value,
        loss=seen.loss,
        met=met,
        seconds=time.monotonic() - began,
        standard_error=seen.standard_error,
        unseen=unseen,
    )
    set_outcome(model, _outcome(trial, criterion, references))  # it is in the file, and takes bytes of it
    return model, replace(trial, nbytes=quantized.nbytes(model))


def _outcome(trial: Trial, criterion: AccuracyCriterion, references: _References) -> Outcome:
    gap = 0.0 if trial.met else _strain(trial) - criterion.tolerable_loss
    return Outcome(trial.met, trial.score, references.baseline.value, gap, trial.unseen)


def _seen(score: Score) -> Score:
    """The samples that the search may look at."""
    return Score(score.value, None if score.samples is None else score.samples[0::2])


def _best(trials: Sequence[Trial]) -> int:
    """The number of the smallest trial that meets the criterion, else of the one that lost least."""

    def rank(number: int) -> tuple[bool, float, float]:
        trial = trials[number]
        return (False, trial.nbytes, trial.loss) if trial.met else (True, _strain(trial), trial.nbytes)

    return min(range(len(trials)), key=rank)


def _strain(trial: Trial) -> float:
    return strain(trial.loss, trial.unseen)


@dataclass(frozen=True)
class _Market:
    """Says which offer to try next: a pure function of the finished trials.

    Args:
        compressor: makes offers.
        finest: the offer of least damage that may be tried.
        start: the damage of the first trial.
        tolerable_loss: in the unit of the trials' losses.
    """

    compressor: Compressor[nn.Module]
    finest: Offer
    start: float
    tolerable_loss: float

    def next(self, trials: Sequence[Trial]) -> Offer | None:
        """The next offer; None when no further trial is worth making."""
        if not trials:
            return self._offer(math.log(self.start))
        good, bad = _bracket(trials)
        law = _fit(trials, self.tolerable_loss)
        if good is None:
            assert bad is not None, "a trial is good or bad"
            return None if bad.damage <= self.finest.damage else self._finer(bad, law, len(trials))
        if law is not None and law.trials > 1 and not law.flat and _strain(good) >= _CLOSE * law.aim:
            return None
        offer = self._offer(_coarser(good, law) if bad is None else _between(good, bad, law, trials))
        noise = (good.standard_error or 0.0) / (self.tolerable_loss or math.inf)
        worth = _WORTH * _WORTH_GROWTH ** (len(trials) - 1) * (1 + _WORTH_OF_NOISE * noise)
        return offer if offer.nbytes < (1 - worth) * self._offer(math.log(good.damage)).nbytes else None

    def _offer(self, place: float) -> Offer:
        """The offer at a log damage, within the range."""
        damage = min(math.exp(place), self.compressor.most)
        if damage <= self.finest.damage:
            return self.finest
        offer = self.compressor.offer(damage)
        # Real bytes differ a little from planned ones; the finest offer alone is sure to be within the limit.
        return self.finest if offer.nbytes > 0.995 * self.finest.nbytes else offer

    def offer_of(self, trial: Trial) -> Offer:
        """The offer that a trial, of this run or of an earlier one, was made of."""
        return self.finest if trial.damage == self.finest.damage else self.compressor.offer(trial.damage)

    def _finer(self, bad: Trial, law: _Law | None, failures: int) -> Offer:
        """Everything has failed so far: go down by ever larger steps, and soon to the end of the range."""
        if failures >= _PATIENCE or (failures > 1 and (law is None or law.flat)):
            return self.finest
        place = law.place if law is not None else math.log(bad.damage) - _BOLDEST
        return self._offer(min(place, math.log(bad.damage) - _LEAST_STEP * 2 ** (failures - 1)))


def _bracket(trials: Sequence[Trial]) -> tuple[Trial | None, Trial | None]:
    """The trial of most damage that is good, and the one of least damage above it that is bad."""
    good = max((trial for trial in trials if trial.met), key=lambda trial: trial.damage, default=None)
    floor = 0.0 if good is None else good.damage
    bad = min(
        (trial for trial in trials if not trial.met and trial.damage > floor),
        key=lambda trial: trial.damage,
        default=None,
    )
    return good, bad


def _coarser(good: Trial, law: _Law | None) -> float:
    """Nothing has failed so far: go where the law says, but not too far beyond what is known."""
    known = math.log(good.damage)
    if law is None or law.flat:
        return known + _BOLD
    # Of one trial the slope is not known: even where its loss is near the aim, there may be a long way to go.
    least = _LEAST_STEP_UP if law.trials == 1 else 0.0
    return known + min(max(law.place - known, least), _BOLDEST)


def _between(good: Trial, bad: Trial, law: _Law | None, trials: Sequence[Trial]) -> float:
    """Where the law says if that is inside the bracket, and the bracket at least halves in two trials."""
    low, high = math.log(good.damage), math.log(bad.damage)
    earlier = _width(trials[:-2])
    slow = earlier is not None and high - low > earlier / 2
    return (low + high) / 2 if law is None or law.flat or slow or not low < law.place < high else law.place


def _width(trials: Sequence[Trial]) -> float | None:
    good, bad = _bracket(trials)
    return None if good is None or bad is None else math.log(bad.damage / good.damage)


@dataclass(frozen=True)
class _Law:
    """`loss = c * damage ** slope`, fitted.

    Args:
        place: the log damage at which the loss is at the aim.
        aim: a loss, not above the tolerable one.
        trials: how many it goes through.
        flat: whether the loss hardly falls with the damage, so that the place is a guess.
    """

    place: float
    aim: float
    trials: int
    flat: bool


def _fit(trials: Sequence[Trial], tolerable_loss: float) -> _Law | None:
    """A weighted fit through all trials whose loss stands out of the noise; None where there are none.

    One trial gives a line of slope 1; two exact ones give the secant; of many, those near the aim count most. It is the
    least-squares line whose slope has a prior of 1 +- 1.
    """
    known = [trial for trial in trials if _strain(trial) > 2 * (trial.standard_error or 0.0)]
    if not known or tolerable_loss <= 0:
        return None
    nearest = min(known, key=lambda trial: abs(math.log(_strain(trial) / tolerable_loss)))
    aim = max(_LEAST_AIM * tolerable_loss, _AIM * tolerable_loss - (nearest.standard_error or 0.0))
    losses = np.array([_strain(trial) for trial in known])
    x = np.array([math.log(trial.damage) for trial in known])
    y = np.log(losses / aim)
    noise = np.array([trial.standard_error or 0.0 for trial in known]) / losses
    weight = 1 / (_NEAR**2 + (_FAR * y) ** 2 + noise**2)
    x_mean, y_mean = np.average(x, weights=weight), np.average(y, weights=weight)
    spread, together = weight @ (x - x_mean) ** 2, weight @ ((x - x_mean) * (y - y_mean))
    slope = float((together + 1) / (spread + 1))
    bounded = min(max(slope, _SLOPES[0]), _SLOPES[1])
    return _Law(float(x_mean - y_mean / bounded), aim, len(known), slope < _SLOPES[0])
