import numpy as np
import pytest
import torch
from torch import nn

from pared import AccuracyCriterion, EvaluationError
from pared.artifact.outcome import Confirmation
from pared.fitting.search.evaluate import Score, confirm, confirm_elsewhere, deciding_loss, evaluate


@pytest.mark.parametrize("answer", [0.5, 1, np.float32(0.5), torch.tensor(0.5), np.array([0.5]), [0.5]])
def test_numbers_of_all_kinds(answer: object) -> None:
    score = evaluate(lambda model: answer, nn.Identity())
    assert score.value in (0.5, 1.0)
    assert score.unseen is None


def test_samples_are_split_into_even_and_odd() -> None:
    score = evaluate(lambda model: torch.arange(6.0), nn.Identity())
    assert score.value == 2.0
    assert score.unseen is not None
    assert score.unseen.tolist() == [1.0, 3.0, 5.0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "eval_func: returned a NoneType, which is not a score"),
        ("0.9", "eval_func: returned a str, which is not a score"),
        (True, "eval_func: returned a bool, which is not a score"),
        ({"acc": 0.9}, "eval_func: returned a dict, which is not a score"),
        (np.zeros((2, 2)), "eval_func: returned a ndarray of shape (2, 2), which is not a score"),
        ([1.0, 2.0], "eval_func: returned a list, which is not a score"),
        (float("nan"), "eval_func: returned NaN or infinity"),
    ],
)
def test_what_is_no_score(answer: object, words: str) -> None:
    with pytest.raises(EvaluationError) as error:
        evaluate(lambda model: answer, nn.Identity())
    assert str(error.value).splitlines()[0] == words


def test_an_error_keeps_its_traceback() -> None:
    def broken(model: nn.Module) -> float:
        raise KeyError("labels")

    with pytest.raises(EvaluationError) as error:
        evaluate(broken, nn.Identity())
    assert str(error.value).splitlines()[0] == "eval_func: raised KeyError: 'labels'"
    cause = error.value.__cause__
    assert isinstance(cause, KeyError)
    assert cause.__traceback__ is not None


def test_the_confirmation_is_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 200)  # samples differ widely, but the loss is nearly the same on each
    baseline = Score(0.0, np.repeat(100 + hard, 2))
    score = Score(0.0, np.repeat(99.5 + hard + rng.normal(0, 0.01, 200), 2))
    confirmation = confirm(AccuracyCriterion(), score, baseline)
    assert confirmation is not None
    assert confirmation.standard_error is not None
    assert confirmation.standard_error < 1e-4
    assert confirmation.loss == pytest.approx(0.005, rel=0.1)


def test_unseen_samples_have_two_standard_errors_but_not_all_samples_together() -> None:
    def unseen(loss: float) -> Confirmation:
        return Confirmation(score=0.0, baseline=0.0, loss=loss, standard_error=0.002)

    assert deciding_loss(0.010, None) == 0.010
    assert deciding_loss(0.010, unseen(0.004)) == 0.010
    assert deciding_loss(0.008, unseen(0.012)) == pytest.approx(0.010)
    assert deciding_loss(0.002, unseen(0.018)) == pytest.approx(0.014)


def test_scores_of_different_samples_are_not_compared() -> None:
    with pytest.raises(EvaluationError) as error:
        confirm(AccuracyCriterion(), Score(1.0), Score(1.0, np.ones(8)))
    assert str(error.value).splitlines()[0] == (
        "eval_func: returned 8 samples for the float model and one number for the quantized one"
    )


def test_other_data_are_used_whole() -> None:
    confirmation = confirm_elsewhere(AccuracyCriterion(), Score(1.0, np.array([1.0, 0.0] * 8)), Score(1.0, np.ones(16)))
    assert confirmation.loss == 0.5
