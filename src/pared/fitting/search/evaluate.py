"""Scores: what `eval_func` may return, how it is read, and what is kept back to confirm the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from pared.artifact.outcome import Confirmation
from pared.errors import EvaluationError
from pared.fitting.config import AccuracyCriterion
from pared.scalars import plain

EvalFunc = Callable[[nn.Module], Any]


Samples = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Score:
    """What `eval_func` said of one model.

    Args:
        value: what the search sees: the number, or the mean of the even samples.
        samples: all of them; None where the score is one number.
    """

    value: float
    samples: Samples | None = None

    @property
    def unseen(self) -> Samples | None:
        """The odd samples, kept back for the confirmation."""
        return None if self.samples is None else self.samples[1::2]


def evaluate(function: EvalFunc, model: nn.Module, name: str = "eval_func") -> Score:
    """Call the user's function and read its answer.

    Args:
        function: returns a number, or a one-dimensional array with a score per sample.
        model: to be scored.
        name: of the function, for errors.

    Raises:
        EvaluationError: it raised (its traceback is kept as the cause), or returned no finite number.

    >>> evaluate(lambda model: [1.0, 0.0, 3.0, 0.0], nn.Identity()).value
    2.0
    """
    try:
        answer = function(model)
    except Exception as error:
        raise EvaluationError(
            f"raised {type(error).__name__}: {error}",
            where=name,
            remedy="See the traceback above: it is the function's own. It is called as function(model).",
        ) from error
    return _read(answer, name)


def _read(answer: object, name: str) -> Score:
    if isinstance(answer, (list, tuple)):
        answer = [plain(one) for one in answer]
    answer = plain(answer)
    if isinstance(answer, Tensor):
        answer = answer.detach().cpu().double().numpy()
    if isinstance(answer, bool):
        raise _no_number(answer, name)
    if isinstance(answer, (int, float, list, np.ndarray)):
        try:
            values = np.asarray(answer, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise _no_number(answer, name) from None
    else:
        raise _no_number(answer, name)
    if values.ndim > 1 or values.size == 0 or (values.ndim == 1 and 1 < values.size < 4):
        raise _no_number(answer, name)
    if not np.isfinite(values).all():
        raise EvaluationError(
            "returned NaN or infinity", where=name, remedy="Check the function on the float model by itself."
        )
    if values.size == 1:
        return Score(float(values.reshape(-1)[0]))
    return Score(float(values[0::2].mean()), values)


def _no_number(answer: object, name: str) -> EvaluationError:
    shape = f" of shape {answer.shape}" if isinstance(answer, np.ndarray) else ""
    return EvaluationError(
        f"returned a {type(answer).__name__}{shape}, which is no score",
        where=name,
        remedy="Return one number, or a one-dimensional array with a score for each of at least four samples.",
    )


def confirm(criterion: AccuracyCriterion, score: Score, baseline: Score) -> Confirmation | None:
    """The result on the samples that the search has not seen, where there are any, with a paired standard error.

    Raises:
        EvaluationError: the two scores do not have the same number of samples.
    """
    _check_pairs(score, baseline, "eval_func")
    if score.unseen is None or baseline.unseen is None:
        return None
    return _paired(criterion, score.unseen, baseline.unseen)


def compare(criterion: AccuracyCriterion, score: Score, baseline: Score) -> Confirmation:
    """The result of a function that was called on other data: all of its samples are unseen.

    Raises:
        EvaluationError: the two scores do not have the same number of samples.
    """
    _check_pairs(score, baseline, "confirm_func")
    if score.samples is None or baseline.samples is None:
        return Confirmation(score.value, baseline.value, criterion.loss(score.value, baseline.value))
    return _paired(criterion, score.samples, baseline.samples)


def _check_pairs(score: Score, baseline: Score, name: str) -> None:
    sizes = [None if one.samples is None else len(one.samples) for one in (baseline, score)]
    if sizes[0] != sizes[1]:
        raise EvaluationError(
            f"returned {_amount(sizes[0])} for the float model and {_amount(sizes[1])} for the quantized one",
            where=name,
            remedy="Score the same samples, in the same order, at every call.",
        )


def _amount(samples: int | None) -> str:
    return "one number" if samples is None else f"{samples} samples"


def _paired(criterion: AccuracyCriterion, score: Samples, baseline: Samples) -> Confirmation:
    own, reference = float(score.mean()), float(baseline.mean())
    difference = score - baseline
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    if criterion.criterion == "relative":
        error /= abs(reference) or 1.0
    return Confirmation(own, reference, criterion.loss(own, reference), error)


def strain(loss: float, confirmation: Confirmation | None) -> float:
    """The loss that decides: at most the tolerable one if and only if the criterion is met, on unseen data too.

    It is the largest of three: the loss that the search saw; its mean with the unseen one, so that all samples together
    keep what was asked for; and the unseen one, given two standard errors.

    >>> strain(0.008, Confirmation(score=0.0, baseline=0.0, loss=0.011, standard_error=0.001))
    0.0095
    """
    if confirmation is None:
        return loss
    unseen = confirmation.loss
    return max(loss, (loss + unseen) / 2, unseen - 2 * (confirmation.standard_error or 0.0))
