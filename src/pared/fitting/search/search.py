"""The search: root finding on one number, the damage, for the smallest model that meets the accuracy criterion.

`strategy` says which model to try next; here it is built, scored and recorded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from torch import nn

from pared.artifact.outcome import Confirmation, Outcome, Trial
from pared.executors.executor import Executor
from pared.fitting.config import AccuracyCriterion
from pared.fitting.search.compressor import DEFAULT_DAMAGE
from pared.fitting.search.evaluate import EvalFunc, Score, confirm, confirm_elsewhere, deciding_loss, evaluate, over
from pared.fitting.search.maker import Made, Maker, OperatingPoint
from pared.fitting.search.strategy.laws import loss_of
from pared.fitting.search.strategy.strategy import Strategy
from pared.fitting.search.workspace import Workspace

log = logging.getLogger(__name__)

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

    def over(self, executor: Executor) -> Judge:
        """The same, where the parts of scores that can be divided are found by an executor."""
        confirm_func = None if self.confirm_func is None else over(executor, self.confirm_func)
        return replace(self, eval_func=over(executor, self.eval_func), confirm_func=confirm_func)

    def allows_trial(self, made: int, began: float) -> bool:
        """Whether a trial may begin after `made` others, the search having begun at `began` on the monotonic clock."""
        in_time = self.timeout == 0 or time.monotonic() - began <= self.timeout
        return made < self.max_trials and (made == 0 or in_time)  # at least one, however little time there is


def search(
    compressor: Maker[Made],
    judge: Judge,
    *,
    max_size: int | None = None,
    references: References | None = None,
    workspace: Workspace | None = None,
    start: float = DEFAULT_DAMAGE,
) -> Made:
    """Find the smallest model that meets the criterion, on the search's data and on unseen data.

    Args:
        compressor: makes the models.
        judge: decides which model is good enough.
        max_size: the most bytes that the file may take; no larger model is tried.
        references: the float model's scores. Default: they are found out.
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
    references = references or References.of(compressor, judge, workspace)
    trials: tuple[Trial, ...] = workspace.trials if workspace is not None else ()
    strategy: Strategy | None = None
    best_model: Made | None = None  # None as long as the best trial is an earlier run's
    try:
        finest = compressor.within_bytes(max_size) if max_size is not None else compressor.at_damage(compressor.least)
        strategy = Strategy(compressor, finest, start, judge.criterion.tolerable_loss)
        while judge.allows_trial(len(trials), began):
            point = strategy.next(trials)
            if point is None:
                break
            model, trial = _try(compressor, point, judge, references)
            is_best = _best((*trials, trial)) == len(trials)
            trials, best_model = (*trials, trial), (model if is_best else best_model)
            log.info("trial %d: %s", len(trials), trial)  # only now, as Ctrl-C may come while it is written
            if workspace is not None:
                workspace.add(trial, partial(compressor.save, model))
    except KeyboardInterrupt:
        if not trials:
            raise
        log.warning("interrupted: the best of %d trials is returned", len(trials))
    number = _best(trials)
    if best_model is None:
        assert workspace is not None, "without a workspace the best trial was made in this run"
        best_model = _read(compressor, workspace, number)
    outcome = replace(_outcome(trials[number], judge.criterion, references), trials=trials)
    if not outcome.met:
        outcome = replace(outcome, contributors=_contributors(strategy, trials[number]))
        log.warning("the criterion is not met: %.4g too much was lost; the best model is returned", outcome.gap)
    return compressor.told(best_model, outcome)


def _read(compressor: Maker[Made], workspace: Workspace, number: int) -> Made:
    """Read the model of an earlier run's trial. Ctrl-C does not stop it: Ctrl-C asks for just this model."""
    try:
        return compressor.read(workspace.file(number))
    except KeyboardInterrupt:
        log.warning("interrupted: the best model so far is still read")
        return compressor.read(workspace.file(number))


def _contributors(strategy: Strategy | None, trial: Trial) -> tuple[tuple[str, float], ...]:
    """The largest contributors to the damage of a trial's model; none if Ctrl-C came before they were known."""
    if strategy is None:
        return ()
    try:
        return tuple(strategy.planner.contributors(strategy.point_of(trial)))[:_CONTRIBUTORS_NAMED]
    except KeyboardInterrupt:
        log.warning("interrupted: the largest contributors to the damage were not determined")
        return ()


@dataclass(frozen=True)
class References:
    """The float model's scores by `eval_func` and, if there is one, by `confirm_func`."""

    baseline: Score
    confirming: Score | None

    @classmethod
    def of(cls, compressor: Maker[Any], judge: Judge, workspace: Workspace | None) -> References:
        """Call the functions, or read the records of an earlier run.

        Raises:
            EvaluationError: a function raised, or returned no score.
            ConfigError: the criterion cannot use the score.
        """
        baseline = _reference("eval_func", judge.eval_func, compressor, workspace)
        judge.criterion.loss(baseline.value, baseline.value)
        confirm(judge.criterion, baseline, baseline)
        if judge.confirm_func is None:
            return cls(baseline, None)
        confirming = _reference("confirm_func", judge.confirm_func, compressor, workspace)
        confirm_elsewhere(judge.criterion, confirming, confirming)
        return cls(baseline, confirming)


def _reference(name: str, function: EvalFunc, compressor: Maker[Any], workspace: Workspace | None) -> Score:
    known = workspace.baseline(name) if workspace is not None else None
    if known is not None:
        return known
    with compressor.original() as original:
        score = evaluate(function, original, name)
    if workspace is not None:
        workspace.set_baseline(name, score)
    return score


@dataclass(frozen=True)
class Judgement:
    """The score of a model.

    Args:
        score: what the search sees of it.
        seen: the loss on the search's data.
        unseen: the loss on other data; None if there are none, or if the first loss is too large already.
        met: whether the criterion is met.
    """

    score: float
    seen: Confirmation
    unseen: Confirmation | None
    met: bool


def judged(candidate: nn.Module, judge: Judge, references: References) -> Judgement:
    """Score a model, and confirm the score if it is good enough.

    Args:
        candidate: a model that the user's functions may change as they like.
        judge: the functions, and how much may be lost.
        references: the float model's scores.

    Raises:
        EvaluationError: a function raised, or returned no score.
    """
    criterion, baseline = judge.criterion, references.baseline
    score = evaluate(judge.eval_func, candidate)
    unseen = confirm(criterion, score, baseline)
    met = criterion.met(score.value, baseline.value)
    if met and judge.confirm_func is not None and references.confirming is not None:
        elsewhere = evaluate(judge.confirm_func, candidate, "confirm_func")
        unseen = confirm_elsewhere(criterion, elsewhere, references.confirming)
    seen = confirm_elsewhere(criterion, score.seen, baseline.seen)
    met = met and deciding_loss(seen.loss, unseen) <= criterion.tolerable_loss + _TOLERANCE
    return Judgement(score.value, seen, unseen, met)


def _try(compressor: Maker[Made], point: OperatingPoint, judge: Judge, references: References) -> tuple[Made, Trial]:
    """Build a model, score it, confirm the score if it is good enough, and write the result into the model."""
    began = time.monotonic()
    model = compressor.build(point)
    with compressor.candidate(model) as candidate:
        found = judged(candidate, judge, references)
    trial = Trial(
        price=point.price,
        damage=point.damage,
        nbytes=point.nbytes,
        score=found.score,
        loss=found.seen.loss,
        met=found.met,
        seconds=time.monotonic() - began,
        standard_error=found.seen.standard_error,
        unseen=found.unseen,
    )
    model = compressor.told(
        model, _outcome(trial, judge.criterion, references)
    )  # before the bytes are counted: the file holds it
    return model, replace(trial, nbytes=compressor.nbytes_of(point, model))


def _outcome(trial: Trial, criterion: AccuracyCriterion, references: References) -> Outcome:
    gap = 0.0 if trial.met else loss_of(trial) - criterion.tolerable_loss
    return Outcome(trial.met, trial.score, references.baseline.value, gap, trial.unseen)


def _best(trials: Sequence[Trial]) -> int:
    """The index of the smallest trial that meets the criterion, else of the one that lost least."""

    def rank(index: int) -> tuple[bool, float, float]:
        trial = trials[index]
        return (False, trial.nbytes, trial.loss) if trial.met else (True, loss_of(trial), trial.nbytes)

    return min(range(len(trials)), key=rank)
