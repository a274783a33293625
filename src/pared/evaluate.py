"""Scores: what `eval_func` may return, how it is read, and what is kept back to confirm the result."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from pared.config import AccuracyCriterion
from pared.errors import EvaluationError
from pared.reporting import Confirmation

EvalFunc = Callable[[nn.Module], Any]


@dataclass(frozen=True, eq=False)
class Score:
    """What `eval_func` said of one model.

    Args:
        value: what the search sees: the number, or the mean of the even samples.
        unseen: the odd samples, kept back for the confirmation; None where the score is one number.
    """

    value: float
    unseen: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None


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
    if isinstance(answer, Tensor):
        answer = answer.detach().cpu().double().numpy()
    if isinstance(answer, bool):
        raise _no_number(answer, name)
    if isinstance(answer, numbers.Real):
        values = np.array(float(answer))
    elif isinstance(answer, (list, tuple, np.ndarray)):
        try:
            values = np.asarray(answer, dtype=np.float64)
        except (TypeError, ValueError):
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
    return Score(float(values[0::2].mean()), values[1::2])


def _no_number(answer: object, name: str) -> EvaluationError:
    shape = f" of shape {answer.shape}" if isinstance(answer, np.ndarray) else ""
    return EvaluationError(
        f"returned a {type(answer).__name__}{shape}, which is no score",
        where=name,
        remedy="Return one number, or a one-dimensional array with a score for each of at least four samples.",
    )


def confirm(criterion: AccuracyCriterion, score: Score, baseline: Score) -> Confirmation | None:
    """The result on the samples that the search has not seen, where there are any, with a paired standard error."""
    if score.unseen is None or baseline.unseen is None or score.unseen.shape != baseline.unseen.shape:
        return None
    own, reference = float(score.unseen.mean()), float(baseline.unseen.mean())
    difference = score.unseen - baseline.unseen
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    if criterion.criterion == "relative":
        error /= abs(reference) or 1.0
    return Confirmation(own, reference, criterion.loss(own, reference), error)


def compare(criterion: AccuracyCriterion, score: Score, baseline: Score) -> Confirmation:
    """The result of a function that was called on other data: all of its samples are unseen."""
    return Confirmation(score.value, baseline.value, criterion.loss(score.value, baseline.value))


def confirmed(criterion: AccuracyCriterion, confirmation: Confirmation) -> bool:
    """Whether the loss on unseen data is within the tolerable loss, give or take two standard errors."""
    return confirmation.loss <= criterion.tolerable_loss + 2 * (confirmation.standard_error or 0.0) + 1e-12
