"""Scores of a text for `fit`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pared
from pared import AccuracyCriterion, PostTrainingQuantConfig
from tests.evaluation.models import Recurrent

IDS = torch.randint(17, (400,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("reference", [None, Recurrent(seed=1)])
def test_the_mean_of_the_scores_is_that_of_the_tokens(reference: Recurrent | None) -> None:
    model = Recurrent()
    scores = pared.text_score(IDS, reference=reference, context=30)(model)
    found = pared.evaluate(model, IDS, reference, context=30)
    assert len(scores) == len(found.windows)
    assert np.mean(scores) == pytest.approx(-found.loss if reference is None else -found.kl, rel=1e-12)


def test_few_windows_give_one_number() -> None:
    score = pared.text_score(IDS, context=300)(Recurrent())
    assert score == pytest.approx(-pared.evaluate(Recurrent(), IDS, context=300).loss, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("relative_to_float", [False, True])
def test_fit_keeps_what_the_score_asks_for(relative_to_float: bool) -> None:
    model = Recurrent().eval()
    score = pared.text_score(IDS, reference=model if relative_to_float else None, context=50)
    criterion = AccuracyCriterion(criterion="absolute", tolerable_loss=0.01)
    conf = PostTrainingQuantConfig(accuracy_criterion=criterion, approach="weight_only")
    small = pared.fit(model, conf, [IDS[None, :50]], score, quiet=True)
    assert small.pared.met
    found = pared.evaluate(small, IDS, model, context=50)
    assert (found.kl if relative_to_float else found.loss - found.reference_loss) <= 0.012
    assert found.kl > 1e-4  # and uses it
