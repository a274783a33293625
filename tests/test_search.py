"""The ladder: what is tried, when it stops, and the truth about it."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn

import pared
from pared import AccuracyCriterion, ConfigError, PostTrainingQuantConfig

X = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 16)).eval()


def scripted_scores(*scores: float) -> Callable[[nn.Module], float]:
    """An `eval_func` that says one score after the other."""
    rest: Iterator[float] = iter(scores)
    return lambda model: next(rest)


def conf(**options: object) -> PostTrainingQuantConfig:
    return PostTrainingQuantConfig(approach="static", **options)


@pytest.mark.parametrize(
    ("scores", "tried", "met", "score"),
    [
        ((1.0, 0.995), ["static"], True, 0.995),
        ((1.0, 0.9, 0.995), ["static", "dynamic"], True, 0.995),
        ((1.0, 0.9, 0.8, 1.0), ["static", "dynamic", "weight_only"], True, 1.0),
        ((1.0, 0.9, 0.97, 0.8), ["static", "dynamic", "weight_only"], False, 0.97),
        ((-1.0, -1.005), ["static"], True, -1.005),
    ],
)
def test_the_ladder_is_climbed_until_the_criterion_is_met(
    scores: tuple[float, ...], tried: list[str], met: bool, score: float
) -> None:
    q = pared.fit(network(), conf(), [X], scripted_scores(*scores))
    assert [trial.name for trial in q.trials] == tried
    assert (q.met, q.score, q.baseline) == (met, score, scores[0])


def test_an_unreachable_goal_gives_the_best_model_and_the_gap() -> None:
    q = pared.fit(network(), conf(), [X], scripted_scores(1.0, 0.9, 0.97, 0.8))
    assert isinstance(q, nn.Sequential)
    assert "NOT met, 0.02 too much was lost" in q.report()
    assert [trial.met for trial in q.trials] == [False] * 3


def test_lower_can_be_better() -> None:
    criterion = AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=0.5)
    q = pared.fit(network(), conf(accuracy_criterion=criterion), [X], scripted_scores(2.0, 3.0, 2.4))
    assert (q.met, q.score) == (True, 2.4)


def test_real_scores_of_the_real_models() -> None:
    net = network()
    with torch.no_grad():
        target = net(X)

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return -float((model(X) - target).square().mean())

    criterion = AccuracyCriterion(criterion="absolute", tolerable_loss=1e-3)
    q = pared.fit(net, conf(accuracy_criterion=criterion), [X], score)
    assert q.baseline == 0.0
    assert q.met
    assert q.score == score(q), "the score reported is that of the model returned"


def test_max_trials_ends_the_ladder() -> None:
    q = pared.fit(network(), conf(max_trials=1), [X], scripted_scores(1.0, 0.5))
    assert (len(q.trials), q.met) == (1, False)


def test_the_baseline_is_scored_in_eval_mode_and_first() -> None:
    seen = []

    def score(model: nn.Module) -> float:
        seen.append(model.training)
        return 1.0

    pared.fit(nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train(), None, None, score)
    assert seen == [False, False]


def test_a_zero_baseline_is_refused_before_any_trial() -> None:
    calls = []

    def score(model: nn.Module) -> float:
        calls.append(model)
        return 0.0

    with pytest.raises(ConfigError, match="the baseline scores 0"):
        pared.fit(network(), conf(), [X], score)
    assert len(calls) == 1


def test_ctrl_c_returns_the_best_so_far() -> None:
    answers = iter([1.0, 0.9])

    def score(model: nn.Module) -> float:
        try:
            return next(answers)
        except StopIteration:
            raise KeyboardInterrupt from None

    q = pared.fit(network(), conf(), [X], score)
    assert (q.met, q.score) == (False, 0.9)


def test_samples_are_confirmed_on_the_odd_ones() -> None:
    def score(model: nn.Module) -> np.ndarray:
        with torch.no_grad():
            return 1 + 0.01 * model(X).abs().mean(1).numpy()

    q = pared.fit(network(), conf(), [X], score)
    assert q.met
    assert "on unseen data: score 1.0" in q.report()


def test_a_result_that_is_not_confirmed_is_not_met() -> None:
    confirmed_scores = scripted_scores(1.0, 0.5, 0.6, 0.995)
    q = pared.fit(network(), conf(), [X], scripted_scores(1.0, 1.0, 1.0, 1.0), confirmed_scores)
    assert [trial.met for trial in q.trials] == [False, False, True]
    assert q.met


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_max_size_is_kept(share: float) -> None:
    net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    plain = pared.fit(net)
    limit = int(share * plain.nbytes)
    q = pared.fit(net, PostTrainingQuantConfig(max_size=limit), [torch.randn(8, 512)])
    assert q.nbytes <= limit
    assert q.nbytes > 0.9 * limit - 2500


def test_an_impossible_max_size_says_what_is_possible() -> None:
    with pytest.raises(ConfigError, match="max_size is 100 bytes, and even at 0.25 bits per weight the file takes"):
        pared.fit(network(), PostTrainingQuantConfig(max_size=100))
