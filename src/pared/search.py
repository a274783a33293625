"""The search: candidates are built, scored and judged until the criterion is met; the best one is returned, always."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from torch import nn

from pared import model as quantized
from pared.config import AccuracyCriterion, Approach
from pared.evaluate import EvalFunc, Score, compare, confirm, confirmed, evaluate
from pared.reporting import Outcome, Trial

log = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# What is tried, in order, until the criterion is met: ever less of the model runs in int8.
LADDER: Final[dict[Approach, tuple[Approach, ...]]] = {
    "auto": ("auto", "dynamic", "weight_only"),
    "static": ("static", "dynamic", "weight_only"),
    "dynamic": ("dynamic", "weight_only"),
    "weight_only": ("weight_only",),
}


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
    confirm_func: EvalFunc | None
    max_trials: int
    timeout: float


def climb(
    rungs: Sequence[Approach],
    build: Callable[[Approach], ModuleT | None],
    original: nn.Module,
    judge: Judge,
) -> ModuleT:
    """Try the rungs until one meets the criterion, on the search's data and on unseen ones.

    Args:
        rungs: from `LADDER`.
        build: the quantized model of a rung; None if it would equal an earlier one.
        original: the float model, in eval mode.
        judge: who decides.

    Returns:
        the first model that meets the criterion, else the one that lost least; its outcome says how it went. Ctrl-C
        ends the search with the best model so far.
    """
    start = time.monotonic()
    baseline = evaluate(judge.eval_func, original)
    judge.criterion.loss(baseline.value, baseline.value)  # refuses a relative loss of a zero baseline, before the work
    confirm(judge.criterion, baseline, baseline)  # ... and of zero unseen samples
    other = evaluate(judge.confirm_func, original, "confirm_func") if judge.confirm_func else None
    found: list[tuple[ModuleT, Trial, Outcome]] = []
    try:
        for rung in rungs:
            if len(found) == judge.max_trials or (found and 0 < judge.timeout < time.monotonic() - start):
                break
            model = build(rung)
            if model is None:
                continue
            trial, outcome = _judge(rung, model, judge, baseline, other)
            found.append((model, trial, outcome))
            log.info("trial %d: %s", len(found), trial)
            if outcome.met:
                break
    except KeyboardInterrupt:
        if not found:
            raise
        log.warning("interrupted: the best of %d trials is returned", len(found))
    best, trial, outcome = min(found, key=lambda one: (not one[2].met, one[1].loss))
    if not outcome.met:
        log.warning("the criterion is not met: %.4g too much was lost; the best model is returned", outcome.gap)
    quantized.set_outcome(best, replace(outcome, trials=tuple(one[1] for one in found)))
    return best


def _judge(rung: str, model: nn.Module, judge: Judge, baseline: Score, other: Score | None) -> tuple[Trial, Outcome]:
    """Score one model, confirm the score where it would do, and write the outcome into the model."""
    start = time.monotonic()
    criterion = judge.criterion
    score = evaluate(judge.eval_func, model)
    loss = criterion.loss(score.value, baseline.value)
    met = criterion.met(score.value, baseline.value)
    confirmation = confirm(criterion, score, baseline)
    if met and judge.confirm_func is not None and other is not None:
        confirmation = compare(criterion, evaluate(judge.confirm_func, model, "confirm_func"), other)
    met = met and (confirmation is None or confirmed(criterion, confirmation))
    worst = max(loss, confirmation.loss) if confirmation is not None else loss
    gap = 0.0 if met else worst - criterion.tolerable_loss
    outcome = Outcome(met, score.value, baseline.value, gap, confirmation)
    quantized.set_outcome(model, outcome)
    return Trial(rung, quantized.nbytes(model), score.value, loss, met, time.monotonic() - start), outcome
