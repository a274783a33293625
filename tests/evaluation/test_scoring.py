"""Sums over a window's tokens, against torch's own cross entropy and divergence on the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pared.errors import EvaluationError
from pared.evaluation import scoring
from pared.evaluation.scoring import score


@pytest.mark.parametrize("piece", [1, 64, 1 << 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_as_on_the_whole_matrix_in_double(dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_PIECE", piece)
    own, theirs = (4 * torch.randn(2, 37, 23, dtype=torch.float64)).to(dtype)
    targets = torch.randint(23, (37,))
    found = score(own, targets, theirs)
    a, b = own.double(), theirs.double()
    assert found.tokens == 37
    assert found.loss == pytest.approx(float(F.cross_entropy(a, targets, reduction="sum")), rel=1e-12)
    assert found.reference_loss == pytest.approx(float(F.cross_entropy(b, targets, reduction="sum")), rel=1e-12)
    dense = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="sum", log_target=True)
    assert found.kl == pytest.approx(float(dense), rel=1e-12)
    assert score(own, targets).loss == found.loss
    assert score(own, targets).kl is None


def test_a_model_agrees_with_itself_though_its_logits_are_often_the_same() -> None:
    logits = torch.randint(3, (200, 11)).to(torch.bfloat16)
    found = score(logits, torch.zeros(200, dtype=torch.int64), logits)
    assert found.agreed == 200
    assert found.kl == 0


def test_first_choices_are_counted() -> None:
    theirs = torch.eye(4)
    own = torch.eye(4)
    own[2] = torch.tensor([9.0, 0, 0, 0])
    assert score(own, torch.arange(4), theirs).agreed == 3


def test_probabilities_of_zero() -> None:
    targets = torch.tensor([0])
    never = torch.tensor([[0.0, 0.0, -math.inf]])
    assert score(never, targets, never).kl == 0
    assert score(torch.zeros(1, 3), targets, never).kl == pytest.approx(math.log(1.5))
    assert score(never, targets, torch.zeros(1, 3)).kl == math.inf
    assert score(never, torch.tensor([2])).loss == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("whose", ["model", "reference"])
def test_logits_that_are_none(value: float, whose: str) -> None:
    good, bad = torch.zeros(3, 5), torch.zeros(3, 5)
    bad[1, 2] = value
    pair = (bad, good) if whose == "model" else (good, bad)
    with pytest.raises(EvaluationError, match=f"the logits of the {whose} hold NaN or infinity"):
        score(pair[0], torch.zeros(3, dtype=torch.int64), pair[1])
