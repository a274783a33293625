"""The search: root finding on one number, the damage, for the smallest model that meets the accuracy criterion.

The loss is modelled as `c * damage ** slope`. Trials determine `c` and `slope`, and bracket the answer between a model
that meets the criterion and one that does not.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

import numpy as np
from torch import nn

from pared.artifact.outcome import Outcome, Trial
from pared.fitting.config import AccuracyCriterion
from pared.fitting.search.compressor import DEFAULT_DAMAGE, Compressor, OperatingPoint
from pared.fitting.search.evaluate import EvalFunc, Score, confirm, confirm_elsewhere, deciding_loss, evaluate
from pared.fitting.search.workspace import Workspace
from pared.model.tensors import ModuleT
from pared.runtime import quantized
from pared.runtime.record import set_outcome

log = logging.getLogger(__name__)

# A trial aims at this share of the tolerable loss, less one standard error, so that an error of the fit does not fail
# the trial; never below the second share. A model whose loss comes this close to the aim ends the search.
_AIM: Final = 0.92
_LOWEST_AIM: Final = 0.5
_CLOSE_TO_AIM: Final = 0.85

# After the first trial, the next must promise a file smaller by this share, which grows by this factor with each
# further trial, and where the score is noisy: by this factor for a standard error as large as the tolerable loss.
_MIN_SAVING: Final = 0.01
_MIN_SAVING_GROWTH: Final = 1.5
_MIN_SAVING_NOISE: Final = 4.0

# Slopes of the fitted law that are believed.
_MIN_SLOPE: Final = 0.3
_MAX_SLOPE: Final = 3.0

# Steps in log damage: the largest step to where nothing is known yet; the step up where the loss is lost in noise; the
# least step down from a failure, which doubles with each further failure; the least step up from one good trial.
_MAX_STEP: Final = math.log(10)
_STEP_UP_IN_NOISE: Final = math.log(8)
_MIN_STEP_DOWN: Final = math.log(1.25)
_MIN_STEP_UP: Final = math.log(1.6)
_MAX_FAILURES: Final = 4  # then the finest model is tried

# Of planned bytes, beyond which the finest model is tried: real bytes differ a little, and it is known to fit.
_FINEST_SHARE: Final = 0.995

# Standard deviations of the measured log loss from the law: near the aim, and as a share of the distance far from it.
_DEVIATION_NEAR: Final = 0.03
_DEVIATION_FAR: Final = 0.25

_TOLERANCE: Final = 1e-12  # of the loss: floating-point rounding

_CONTRIBUTORS_NAMED: Final = 5


@dataclass(frozen=True)
class Judge:
    """Decides whether a model is good enough, and whether another one may be scored.

    Args:
        criterion: how much may be lost.
        eval_func: scores a model; the criterion says whether higher or lower is better.
        confirm_func: the same on other data. If None, the odd samples of `eval_func` confirm the result, where it
            returns samples.
        max_trials: how many models may be scored.
        timeout: seconds after which no new trial begins; 0: no limit.
    """

    criterion: AccuracyCriterion
    eval_func: EvalFunc
    confirm_func: EvalFunc | None = None
    max_trials: int = 20
    timeout: float = 0

    def allows_trial(self, made: int, began: float) -> bool:
        """Whether a trial may begin after `made` others, the search having begun at `began` on the monotonic clock."""
        in_time = self.timeout == 0 or time.monotonic() - began <= self.timeout
        return made < self.max_trials and (made == 0 or in_time)  # at least one, however little time there is


def search(
    compressor: Compressor[ModuleT],
    original: nn.Module,
    judge: Judge,
    *,
    max_size: int | None = None,
    workspace: Workspace | None = None,
    start: float = DEFAULT_DAMAGE,
) -> ModuleT:
    """Find the smallest model that meets the criterion, on the search's data and on unseen data.

    Args:
        compressor: makes the models.
        original: the float model, in eval mode.
        judge: decides which model is good enough.
        max_size: the most bytes that the file may take; no larger model is tried.
        workspace: where finished trials are recorded; those of an earlier run count as if they were made now.
        start: the damage of the first trial, or the nearest that the compressor reaches.

    Returns:
        the smallest model that meets the criterion, else the one that lost least; its outcome says which. Ctrl-C at
        any time after the first trial ends the search with the best model so far.

    Raises:
        EvaluationError: a function of the judge raised, or returned no score.
        ConfigError: the criterion is relative and the float model scores 0; or no file is as small as `max_size`.
        KeyboardInterrupt: Ctrl-C before any trial was finished.
    """
    began = time.monotonic()
    references = _References.of(original, judge, workspace)
    trials: tuple[Trial, ...] = workspace.trials if workspace is not None else ()
    strategy: _Strategy | None = None
    best_model: ModuleT | None = None  # None as long as the best trial is an earlier run's
    try:
        finest = compressor.within_bytes(max_size) if max_size is not None else compressor.at_damage(compressor.least)
        strategy = _Strategy(compressor, finest, start, judge.criterion.tolerable_loss)
        while judge.allows_trial(len(trials), began):
            point = strategy.next(trials)
            if point is None:
                break
            model, trial = _try(compressor, point, judge, references)
            is_best = _best((*trials, trial)) == len(trials)
            trials, best_model = (*trials, trial), (model if is_best else best_model)
            log.info("trial %d: %s", len(trials), trial)  # only now, as Ctrl-C may come while it is written
            if workspace is not None:
                workspace.add(trial, model)
    except KeyboardInterrupt:
        if not trials:
            raise
        log.warning("interrupted: the best of %d trials is returned", len(trials))
    number = _best(trials)
    if best_model is None:
        assert workspace is not None, "without a workspace the best trial was made in this run"
        best_model = cast("ModuleT", _read(workspace, number, original))  # of the class of what it was made from
    outcome = replace(_outcome(trials[number], judge.criterion, references), trials=trials)
    if not outcome.met:
        outcome = replace(outcome, contributors=_contributors(strategy, trials[number]))
        log.warning("the criterion is not met: %.4g too much was lost; the best model is returned", outcome.gap)
    set_outcome(best_model, outcome)
    return best_model


def _read(workspace: Workspace, number: int, original: nn.Module) -> nn.Module:
    """Read the model of an earlier run's trial. Ctrl-C does not stop it: Ctrl-C asks for just this model."""
    try:
        return workspace.model(number, original)
    except KeyboardInterrupt:
        log.warning("interrupted: the best model so far is still read")
        return workspace.model(number, original)


def _contributors(strategy: _Strategy | None, trial: Trial) -> tuple[tuple[str, float], ...]:
    """The largest contributors to the damage of a trial's model; none if Ctrl-C came before they were known."""
    if strategy is None:
        return ()
    try:
        return tuple(strategy.compressor.contributors(strategy.point_of(trial)))[:_CONTRIBUTORS_NAMED]
    except KeyboardInterrupt:
        log.warning("interrupted: the largest contributors to the damage were not determined")
        return ()


@dataclass(frozen=True)
class _References:
    """The float model's scores by `eval_func` and, if there is one, by `confirm_func`."""

    baseline: Score
    confirming: Score | None

    @classmethod
    def of(cls, original: nn.Module, judge: Judge, workspace: Workspace | None) -> _References:
        """Call the functions, or read the records of an earlier run; refuse scores that the criterion cannot use."""
        baseline = _reference("eval_func", judge.eval_func, original, workspace)
        judge.criterion.loss(baseline.value, baseline.value)
        confirm(judge.criterion, baseline, baseline)
        if judge.confirm_func is None:
            return cls(baseline, None)
        confirming = _reference("confirm_func", judge.confirm_func, original, workspace)
        confirm_elsewhere(judge.criterion, confirming, confirming)
        return cls(baseline, confirming)


def _reference(name: str, function: EvalFunc, original: nn.Module, workspace: Workspace | None) -> Score:
    known = workspace.baseline(name) if workspace is not None else None
    if known is not None:
        return known
    score = evaluate(function, original, name)
    if workspace is not None:
        workspace.set_baseline(name, score)
    return score


def _try(
    compressor: Compressor[ModuleT], point: OperatingPoint, judge: Judge, references: _References
) -> tuple[ModuleT, Trial]:
    """Build a model, score it, confirm the score if it is good enough, and write the result into the model."""
    began = time.monotonic()
    model = compressor.build(point)
    criterion, baseline = judge.criterion, references.baseline
    candidate = copy.deepcopy(model)  # the user's functions may change it as they like
    score = evaluate(judge.eval_func, candidate)
    unseen = confirm(criterion, score, baseline)
    met = criterion.met(score.value, baseline.value)
    if met and judge.confirm_func is not None and references.confirming is not None:
        elsewhere = evaluate(judge.confirm_func, candidate, "confirm_func")
        unseen = confirm_elsewhere(criterion, elsewhere, references.confirming)
    seen = confirm_elsewhere(criterion, score.seen, baseline.seen)
    met = met and deciding_loss(seen.loss, unseen) <= criterion.tolerable_loss + _TOLERANCE
    trial = Trial(
        price=point.price,
        damage=point.damage,
        nbytes=point.nbytes,
        score=score.value,
        loss=seen.loss,
        met=met,
        seconds=time.monotonic() - began,
        standard_error=seen.standard_error,
        unseen=unseen,
    )
    set_outcome(model, _outcome(trial, criterion, references))  # before the bytes are counted: the file holds it
    return model, replace(trial, nbytes=quantized.nbytes(model))


def _outcome(trial: Trial, criterion: AccuracyCriterion, references: _References) -> Outcome:
    gap = 0.0 if trial.met else _deciding_loss(trial) - criterion.tolerable_loss
    return Outcome(trial.met, trial.score, references.baseline.value, gap, trial.unseen)


def _best(trials: Sequence[Trial]) -> int:
    """The index of the smallest trial that meets the criterion, else of the one that lost least."""

    def rank(index: int) -> tuple[bool, float, float]:
        trial = trials[index]
        return (False, trial.nbytes, trial.loss) if trial.met else (True, _deciding_loss(trial), trial.nbytes)

    return min(range(len(trials)), key=rank)


def _deciding_loss(trial: Trial) -> float:
    return deciding_loss(trial.loss, trial.unseen)


@dataclass(frozen=True)
class _Strategy:
    """Says which operating point to try next: a pure function of the finished trials.

    Args:
        compressor: makes operating points.
        finest: the operating point of least damage that may be tried.
        start: the damage of the first trial.
        tolerable_loss: in the unit of the trials' losses.
    """

    compressor: Compressor[nn.Module]
    finest: OperatingPoint
    start: float
    tolerable_loss: float

    def next(self, trials: Sequence[Trial]) -> OperatingPoint | None:
        """The next operating point; None if no further trial is worth making."""
        if not trials:
            return self._point(math.log(self.start))
        good, bad = _bracket(trials)
        law = _fit(trials, self.tolerable_loss)
        if good is None:
            assert bad is not None, "a trial is good or bad"
            return None if bad.damage <= self.finest.damage else self._finer(bad, law, len(trials))
        if law is not None and law.trials > 1 and not law.flat and _deciding_loss(good) >= _CLOSE_TO_AIM * law.aim:
            return None
        point = self._point(_coarser(good, law) if bad is None else _between(good, bad, law, trials))
        noise = (good.standard_error or 0.0) / (self.tolerable_loss or math.inf)
        min_saving = _MIN_SAVING * _MIN_SAVING_GROWTH ** (len(trials) - 1) * (1 + _MIN_SAVING_NOISE * noise)
        return point if point.nbytes < (1 - min_saving) * self._point(math.log(good.damage)).nbytes else None

    def _point(self, log_damage: float) -> OperatingPoint:
        """The operating point at a log damage, within the range."""
        damage = min(math.exp(log_damage), self.compressor.most)
        if damage <= self.finest.damage:
            return self.finest
        point = self.compressor.at_damage(damage)
        return self.finest if point.nbytes > _FINEST_SHARE * self.finest.nbytes else point

    def point_of(self, trial: Trial) -> OperatingPoint:
        """The operating point of a trial, of this run or of an earlier one."""
        return self.finest if trial.damage == self.finest.damage else self.compressor.at_damage(trial.damage)

    def _finer(self, bad: Trial, law: _Law | None, failures: int) -> OperatingPoint:
        """Everything has failed so far: go down by ever larger steps, and soon to the end of the range."""
        if failures >= _MAX_FAILURES or (failures > 1 and (law is None or law.flat)):
            return self.finest
        known = math.log(bad.damage)
        aimed = law.log_damage if law is not None else known - _MAX_STEP
        return self._point(min(aimed, known - _MIN_STEP_DOWN * 2 ** (failures - 1)))


def _bracket(trials: Sequence[Trial]) -> tuple[Trial | None, Trial | None]:
    """The good trial of most damage, and the bad one of least damage above it."""
    good = max((trial for trial in trials if trial.met), key=lambda trial: trial.damage, default=None)
    floor = 0.0 if good is None else good.damage
    bad = min(
        (trial for trial in trials if not trial.met and trial.damage > floor),
        key=lambda trial: trial.damage,
        default=None,
    )
    return good, bad


def _coarser(good: Trial, law: _Law | None) -> float:
    """Nothing has failed so far: the log damage where the law says, but not too far beyond what is known."""
    known = math.log(good.damage)
    if law is None or law.flat:
        return known + _STEP_UP_IN_NOISE
    # One trial says nothing of the slope: even if its loss is near the aim, the aim may be a long way off.
    least = _MIN_STEP_UP if law.trials == 1 else 0.0
    return known + min(max(law.log_damage - known, least), _MAX_STEP)


def _between(good: Trial, bad: Trial, law: _Law | None, trials: Sequence[Trial]) -> float:
    """The log damage where the law says, if that is inside the bracket and the bracket halves in two trials.

    Otherwise the middle of the bracket.
    """
    low, high = math.log(good.damage), math.log(bad.damage)
    first, last = _bracket(trials[:-2])
    too_slow = first is not None and last is not None and high - low > math.log(last.damage / first.damage) / 2
    if law is None or law.flat or too_slow or not low < law.log_damage < high:
        return (low + high) / 2
    return law.log_damage


@dataclass(frozen=True)
class _Law:
    """`loss = c * damage ** slope`, fitted.

    Args:
        log_damage: where the loss is at the aim.
        aim: a loss, not above the tolerable one.
        trials: how many the law was fitted to.
        flat: whether the loss hardly falls with the damage, so that `log_damage` is a guess.
    """

    log_damage: float
    aim: float
    trials: int
    flat: bool


def _fit(trials: Sequence[Trial], tolerable_loss: float) -> _Law | None:
    """Fit the law to all trials whose loss stands out of the noise; None if there are none.

    It is the weighted least-squares line whose slope has a prior of 1 +- 1: one trial gives a line of slope 1, two
    exact ones give nearly the secant, and of many those near the aim count most.
    """
    clear = [trial for trial in trials if _deciding_loss(trial) > 2 * (trial.standard_error or 0.0)]
    if not clear or tolerable_loss <= 0:
        return None
    nearest = min(clear, key=lambda trial: abs(math.log(_deciding_loss(trial) / tolerable_loss)))
    aim = max(_LOWEST_AIM * tolerable_loss, _AIM * tolerable_loss - (nearest.standard_error or 0.0))
    losses = np.array([_deciding_loss(trial) for trial in clear])
    x = np.array([math.log(trial.damage) for trial in clear])
    y = np.log(losses / aim)
    noise = np.array([trial.standard_error or 0.0 for trial in clear]) / losses
    weight = 1 / (_DEVIATION_NEAR**2 + (_DEVIATION_FAR * y) ** 2 + noise**2)
    x_mean, y_mean = np.average(x, weights=weight), np.average(y, weights=weight)
    variance, covariance = weight @ (x - x_mean) ** 2, weight @ ((x - x_mean) * (y - y_mean))
    slope = float((covariance + 1) / (variance + 1))
    bounded = min(max(slope, _MIN_SLOPE), _MAX_SLOPE)
    return _Law(float(x_mean - y_mean / bounded), aim, len(clear), slope < _MIN_SLOPE)
