"""Scores: what `eval_func` may return, how it is read, and which samples are kept back to confirm the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from pared.artifact.outcome import Confirmation
from pared.errors import EvaluationError
from pared.executors.executor import Executor, LocalExecutor
from pared.fitting.config import AccuracyCriterion
from pared.scalars import plain
from pared.switches import threads, threads_asked

EvalFunc = Callable[[nn.Module], Any]
Samples = np.ndarray[tuple[int], np.dtype[np.float64]]


@runtime_checkable
class Divided(Protocol):
    """An `eval_func` whose score is a sum over parts of its data, which workers can find, each with the whole model."""

    def __call__(self, model: nn.Module) -> Any:
        """The score, found here."""

    def over(self, executor: Executor) -> EvalFunc:
        """The same score, found by an executor."""


def over(executor: Executor, function: EvalFunc) -> EvalFunc:
    """The same function, whose parts are done by an executor if it has any.

    Any other function of the user's runs in this process: nothing is known of what it looks at, and of what it changes.
    """
    if isinstance(function, Divided) and not isinstance(executor, LocalExecutor):
        return function.over(executor)
    return function


_MIN_SAMPLES: Final = 4  # two that the search sees, and two that give the confirmation a standard error


@dataclass(frozen=True, eq=False)
class Score:
    """What `eval_func` returned for one model.

    Args:
        value: what the search sees: the number, or the mean of the even samples.
        samples: the scores of all samples, float64 (samples,); None if the score is one number.
    """

    value: float
    samples: Samples | None = None

    @property
    def seen(self) -> Score:
        """The score on the even samples, which the search may look at."""
        return Score(self.value, None if self.samples is None else self.samples[0::2])

    @property
    def unseen(self) -> Samples | None:
        """The odd samples, which are kept back for the confirmation."""
        return None if self.samples is None else self.samples[1::2]


def evaluate(function: EvalFunc, model: nn.Module, name: str = "eval_func") -> Score:
    """Call the user's function and read its answer.

    Args:
        function: returns a number, or a one-dimensional array with a score per sample.
        model: the model to score.
        name: the function's name, for errors.

    Raises:
        EvaluationError: the function raised (its exception is the cause), or returned something that is not a score:
            neither a finite number nor at least four of them.

    >>> evaluate(lambda model: [1.0, 0.0, 3.0, 0.0], nn.Identity()).value
    2.0
    """
    try:
        with threads(threads_asked()):
            answer = function(model)
    except Exception as error:
        raise EvaluationError(
            f"raised {type(error).__name__}: {error}",
            where=name,
            remedy="The traceback above is the function's own; it is called as function(model).",
        ) from error
    return _read(answer, name)


def _read(answer: object, name: str) -> Score:
    if isinstance(answer, (list, tuple)):
        answer = [plain(sample) for sample in answer]
    answer = plain(answer)
    if isinstance(answer, Tensor):
        answer = answer.detach().cpu().double().numpy()
    if isinstance(answer, bool) or not isinstance(answer, (int, float, list, np.ndarray)):
        raise _not_a_score(answer, name)
    try:
        values = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise _not_a_score(answer, name) from None
    if values.ndim > 1 or values.size == 0 or (values.ndim == 1 and 1 < values.size < _MIN_SAMPLES):
        raise _not_a_score(answer, name)
    if not np.isfinite(values).all():
        raise EvaluationError(
            "returned NaN or infinity", where=name, remedy="Call the function on the float model alone to find out why."
        )
    if values.size == 1:
        return Score(float(values.reshape(-1)[0]))
    return Score(float(values[0::2].mean()), values)


def _not_a_score(answer: object, name: str) -> EvaluationError:
    shape = f" of shape {answer.shape}" if isinstance(answer, np.ndarray) else ""
    return EvaluationError(
        f"returned a {type(answer).__name__}{shape}, which is not a score",
        where=name,
        remedy="Return one number, or a one-dimensional array with a score for each of at least four samples.",
    )


def confirm(criterion: AccuracyCriterion, score: Score, baseline: Score) -> Confirmation | None:
    """The result on the odd samples, which the search has not seen, with a paired standard error.

    Args:
        criterion: gives the loss.
        score: the score of the quantized model.
        baseline: the score of the float model, on the same samples.

    Returns:
        None if the scores are single numbers.

    Raises:
        EvaluationError: the two scores do not have the same number of samples.
    """
    _check_pairs(score, baseline, "eval_func")
    if score.unseen is None or baseline.unseen is None:
        return None
    return _paired(criterion, score.unseen, baseline.unseen)


def confirm_elsewhere(criterion: AccuracyCriterion, score: Score, baseline: Score) -> Confirmation:
    """The result of a function that scores other data: it uses all samples.

    Args and errors are those of `confirm`.
    """
    _check_pairs(score, baseline, "confirm_func")
    if score.samples is None or baseline.samples is None:
        return Confirmation(score.value, baseline.value, criterion.loss(score.value, baseline.value))
    return _paired(criterion, score.samples, baseline.samples)


def _check_pairs(score: Score, baseline: Score, name: str) -> None:
    expected, returned = _amount(baseline), _amount(score)
    if expected != returned:
        raise EvaluationError(
            f"returned {expected} for the float model and {returned} for the quantized one",
            where=name,
            remedy="Score the same samples, in the same order, at every call.",
        )


def _amount(score: Score) -> str:
    return "one number" if score.samples is None else f"{len(score.samples)} samples"


def _paired(criterion: AccuracyCriterion, score: Samples, baseline: Samples) -> Confirmation:
    mean, reference = float(score.mean()), float(baseline.mean())
    difference = score - baseline
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    if criterion.criterion == "relative":
        error /= abs(reference) or 1.0
    return Confirmation(mean, reference, criterion.loss(mean, reference), error)


def deciding_loss(loss: float, confirmation: Confirmation | None) -> float:
    """The loss that decides: the criterion is met, on unseen data too, if it is at most the tolerable one.

    It is the largest of three: the loss that the search saw; the mean of that and the unseen loss, so that all samples
    together meet the criterion; and the unseen loss less two standard errors.

    >>> deciding_loss(0.008, Confirmation(score=0.0, baseline=0.0, loss=0.011, standard_error=0.001))
    0.0095
    """
    if confirmation is None:
        return loss
    unseen = confirmation.loss
    return max(loss, (loss + unseen) / 2, unseen - 2 * (confirmation.standard_error or 0.0))
