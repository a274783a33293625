"""The search: how few trials it takes, how close it comes, when it stops, and the truth about it."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from pared import AccuracyCriterion, ConfigError, EvaluationError
from pared.artifact.outcome import Outcome, Trial
from pared.fitting.search.maker import OperatingPoint
from pared.fitting.search.search import Judge, search
from pared.runtime import quantized
from pared.runtime.record import record_of
from tests.fitting.fakes import Probe, Synthetic, damage_of

Law = Callable[[float], float]


def absolute(tolerable_loss: float, *, higher_is_better: bool = True) -> AccuracyCriterion:
    return AccuracyCriterion(higher_is_better, "absolute", tolerable_loss)


def judge_of(law: Law, tolerable_loss: float = 0.01, baseline: float = 1.0, **options: object) -> Judge:
    """A judge whose score falls by `law(damage)`; the float model, of damage 0, loses nothing."""

    def score(model: nn.Module) -> float:
        damage = damage_of(model)
        return baseline - law(damage) if damage else baseline

    return Judge(absolute(tolerable_loss), score, **options)


def find(law: Law, compressor: Synthetic | None = None, **options: object) -> Outcome:
    return outcome_of(search(compressor or Synthetic(), judge_of(law, **options)))


def outcome_of(model: nn.Module) -> Outcome:
    return record_of(model).outcome


def best(outcome: Outcome) -> Trial:
    """The smallest that met; the outcome's score must be its own."""
    trial = min((trial for trial in outcome.trials if trial.met), key=lambda trial: (trial.nbytes, trial.loss))
    assert trial.score == outcome.score
    return trial


def excess(outcome: Outcome, optimum: float) -> float:
    """The planned bytes of the best model, against those at the damage that is just good enough."""
    return Synthetic().nbytes(best(outcome).damage) / Synthetic().nbytes(optimum)


def power(place: float, slope: float = 1.0, tolerable_loss: float = 0.01) -> Law:
    """The tolerable loss at one damage, and a power of it elsewhere."""
    return lambda damage: tolerable_loss * (damage / place) ** slope


@pytest.mark.parametrize("slope", [0.5, 0.8, 1.0, 1.25, 2.0])
@pytest.mark.parametrize("place", [1e-6, 3e-5, 4e-4, 1e-3, 2e-3, 1e-2])
def test_a_power_law_is_solved_in_few_trials(slope: float, place: float) -> None:
    outcome = find(power(place, slope))
    assert outcome.met
    assert len(outcome.trials) <= 5
    assert excess(outcome, place) <= 1.05


@settings(deadline=None, max_examples=40)
@given(
    slope=st.floats(0.5, 2.2),
    place=st.floats(-6, -1.5).map(lambda power: 10**power),
    tolerable_loss=st.floats(-5, 2).map(lambda power: 10**power),
    baseline=st.floats(-100, 100),
    higher_is_better=st.booleans(),
)
@pytest.mark.slow
def test_any_power_law_direction_and_baseline(
    slope: float, place: float, tolerable_loss: float, baseline: float, higher_is_better: bool
) -> None:
    law = power(place, slope, tolerable_loss)
    sign = -1 if higher_is_better else 1
    criterion = absolute(tolerable_loss, higher_is_better=higher_is_better)
    outcome = outcome_of(search(Synthetic(), Judge(criterion, lambda model: baseline + sign * law(damage_of(model)))))
    assert outcome.met
    assert outcome.gap == 0
    assert len(outcome.trials) <= 5
    assert excess(outcome, place) <= 1.1


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1, 3), min_size=6, max_size=6), st.integers(1, 8))
def test_whatever_the_losses_are_the_search_ends_and_tells_the_truth(heights: list[float], max_trials: int) -> None:
    """Losses at six damages, in units of the tolerable loss, with straight lines between: in no order at all."""
    grid = np.linspace(math.log(1e-9), math.log(0.3), 6)

    def law(damage: float) -> float:
        return 0.01 * float(np.interp(math.log(damage), grid, heights))

    outcome = find(law, max_trials=max_trials)
    assert 1 <= len(outcome.trials) <= max_trials
    assert outcome.met == any(trial.met for trial in outcome.trials)
    assert all(trial.met == (1.0 - trial.score <= 0.01 + 1e-12) for trial in outcome.trials)
    met = [trial.nbytes for trial in outcome.trials if trial.met]
    if met:
        assert best(outcome).nbytes == min(met)
    else:
        assert outcome.score == max(trial.score for trial in outcome.trials)
        assert outcome.gap == pytest.approx(1.0 - outcome.score - 0.01)
    assert len({trial.damage for trial in outcome.trials}) == len(outcome.trials), "no model is evaluated twice"


def test_a_relative_criterion_is_relative_to_the_magnitude_of_the_baseline() -> None:
    for baseline in (-200.0, 0.02):
        absolutely = judge_of(power(1e-4, 1.0, 0.01 * abs(baseline)), baseline=baseline)
        judge = replace(absolutely, criterion=AccuracyCriterion(tolerable_loss=0.01))
        outcome = outcome_of(search(Synthetic(), judge))
        assert outcome.met
        assert excess(outcome, 1e-4) <= 1.05


@pytest.mark.parametrize("seed", range(8))
def test_noisy_samples_cost_few_trials(seed: int) -> None:
    """400 scores with paired noise, drawn anew for every model: one standard error is a fifth of the tolerable loss."""
    rng = np.random.default_rng(seed)
    law = power(2e-4)

    def score(model: nn.Module) -> np.ndarray:
        damage = damage_of(model)
        return 1 - law(damage) + 0.2 * 0.01 * math.sqrt(200 * damage / 2e-4) * rng.normal(size=400)

    outcome = outcome_of(search(Synthetic(), Judge(absolute(0.01), score)))
    assert outcome.met
    assert len(outcome.trials) <= 6
    assert excess(outcome, 2e-4) <= 1.15
    assert outcome.confirmation is not None
    assert outcome.confirmation.standard_error is not None
    assert outcome.confirmation.loss <= 0.01 + 2 * outcome.confirmation.standard_error


@pytest.mark.parametrize(
    "law",
    [
        pytest.param(lambda damage: 0.0 if damage <= 3e-5 else 0.05, id="cliff"),
        pytest.param(lambda damage: 0.004 * (damage * 1e4 // 0.4), id="steps of 0.4 tolerable losses"),
        pytest.param(lambda damage: 0.008 + 0.002 * damage / 1e-2, id="plateau below the tolerable loss"),
        pytest.param(lambda damage: 0.01 * (1.5 * (damage / 1e-3) ** 2 - 0.5 * damage / 1e-3), id="gains first"),
        pytest.param(lambda damage: 0.01 * (damage / 1e-3) ** (0.4 if damage < 1e-4 else 2), id="two slopes"),
        pytest.param(lambda damage: -0.1, id="nothing but gains"),
    ],
)
def test_losses_that_follow_no_power_law(law: Law) -> None:
    compressor = Synthetic()
    grid = np.exp(np.linspace(math.log(compressor.least), math.log(compressor.most), 3000))
    optimum = max(damage for damage in grid if law(damage) <= 0.01)
    outcome = find(law)
    assert outcome.met
    assert len(outcome.trials) <= 7
    assert excess(outcome, optimum) <= 1.13


@pytest.mark.parametrize("slope", [8.0, 10.0, 12.0])
@pytest.mark.parametrize("place", [1e-5, 3e-4, 1e-3, 1e-2])
@pytest.mark.parametrize(("best_decibels", "goal"), [(100.0, 25.0), (60.0, 40.0), (35.0, 30.0)])
def test_a_goal_in_decibels_takes_few_trials(best_decibels: float, goal: float, place: float, slope: float) -> None:
    """Signal to error: so many decibels fewer for ten times the damage, which no power law of the loss describes."""

    def score(model: nn.Module) -> float:
        damage = damage_of(model)
        return min(best_decibels, goal - slope * math.log10(damage / place)) if damage else best_decibels

    outcome = outcome_of(search(Synthetic(), Judge(absolute(best_decibels - goal), score)))
    assert outcome.met
    assert len(outcome.trials) <= 6
    # Where no loss is seen until shortly before the goal, the first loss that is seen may be too large already.
    assert excess(outcome, place) <= (1.06 if best_decibels == 100 else 1.2)


@pytest.mark.parametrize("place", [1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("tolerable", [1, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_counts_of_matches_take_few_trials(place: float, tolerable: int, seed: int) -> None:
    """One number, the share of 200 that match, in steps of 1/200: some are lost by the damage, and others won."""

    def score(model: nn.Module) -> float:
        damage = damage_of(model)
        rng = np.random.default_rng([seed, int(1e12 * damage)])
        changed = min(tolerable * damage / place, 120)
        return (180 - min(180, int(rng.poisson(changed)) - int(rng.poisson(0.3 * changed)))) / 200

    outcome = outcome_of(search(Synthetic(), Judge(absolute(tolerable / 200), score)))
    assert outcome.met
    assert len(outcome.trials) <= 6
    assert excess(outcome, place) <= (1.3 if tolerable == 1 else 1.2)


def test_the_end_of_the_range_is_enough_if_it_meets() -> None:
    outcome = find(lambda damage: 0.0)
    assert outcome.trials[-1].damage == Synthetic().most
    assert best(outcome) == outcome.trials[-1]


def test_no_loss_is_tolerable() -> None:
    outcome = find(lambda damage: max(0.0, damage - 1e-5), tolerable_loss=0.0)
    assert outcome.met
    assert best(outcome).loss <= 0
    assert excess(outcome, 1e-5) <= 1.15


@pytest.mark.parametrize("tolerable_loss", [0.0, 0.01])
def test_an_unreachable_goal_gives_the_best_model_the_gap_and_the_largest_contributors(tolerable_loss: float) -> None:
    model = search(Synthetic(), judge_of(lambda damage: 0.03 + damage, tolerable_loss))
    assert isinstance(model, Probe)
    outcome = outcome_of(model)
    assert damage_of(model) == Synthetic().least, "the finest operating point was tried"
    assert len(outcome.trials) <= 4
    assert outcome.met is False
    assert outcome.gap == pytest.approx(0.03 - tolerable_loss)
    assert outcome.contributors == (("encoder.weight", 0.75), ("decoder.weight", 0.25))
    report = quantized.report(model)
    assert "NOT met" in report
    assert "most of the damage: encoder.weight 75%, decoder.weight 25%" in report
    assert max(map(len, report.splitlines())) <= 100


def test_no_contributors_are_named_when_the_criterion_is_met() -> None:
    assert find(power(1e-4)).contributors == ()


@pytest.mark.parametrize("share", [0.5, 0.9, 0.97, 1.01, 1.5])
def test_max_size_bounds_every_trial(share: float) -> None:
    compressor = Synthetic()
    limit = int(share * compressor.nbytes(1e-4))
    model = search(compressor, judge_of(power(1e-4)), max_size=limit)
    outcome = outcome_of(model)
    assert max(trial.nbytes for trial in outcome.trials) <= limit
    assert outcome.met == (share >= 1)
    if not outcome.met:
        assert compressor.nbytes(damage_of(model)) >= limit - 1, "all of the room is used"
        assert outcome.gap is not None
        assert outcome.gap > 0
    else:
        assert excess(outcome, 1e-4) <= 1.05


def test_max_trials() -> None:
    assert len(find(power(1e-6), max_trials=1).trials) == 1
    assert len(find(lambda damage: 0.0 if damage <= 3e-5 else 0.05, max_trials=3).trials) == 3


def test_after_the_timeout_no_trial_begins() -> None:
    outcome = find(power(1e-6), timeout=1e-9)
    assert len(outcome.trials) == 1
    assert outcome.met is False


def interrupted(place: int, law: Law) -> Callable[[nn.Module], float]:
    """An `eval_func` during whose call of this number the user presses Ctrl-C."""
    calls = []

    def score(model: nn.Module) -> float:
        calls.append(model)
        if len(calls) == place:
            raise KeyboardInterrupt
        return -law(damage_of(model))

    return score


def test_ctrl_c_during_an_evaluation_returns_the_best_so_far() -> None:
    judge = Judge(absolute(0.01), interrupted(4, power(1e-6)))
    outcome = outcome_of(search(Synthetic(), judge))
    assert len(outcome.trials) == 2
    assert outcome.score == max(trial.score for trial in outcome.trials)


def test_ctrl_c_during_a_build_returns_the_best_so_far() -> None:
    class Interrupted(Synthetic):
        def build(self, point: OperatingPoint) -> Probe:
            if self.built:
                raise KeyboardInterrupt
            return super().build(point)

    assert len(find(power(1e-6), Interrupted()).trials) == 1


@pytest.mark.parametrize("place", [1, 2])
def test_ctrl_c_before_any_trial_is_the_callers(place: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(Synthetic(), Judge(absolute(0.01), interrupted(place, power(1e-6))))


def test_the_score_is_that_of_the_model_returned() -> None:
    law = power(1e-4)
    model = search(Synthetic(), judge_of(law))
    outcome = outcome_of(model)
    assert outcome.score == 1.0 - law(damage_of(model))
    assert outcome.baseline == 1.0
    assert best(outcome).damage == damage_of(model)
    assert best(outcome).nbytes == quantized.nbytes(model)


def test_nan_from_the_function() -> None:
    with pytest.raises(EvaluationError, match="eval_func: returned NaN or infinity"):
        find(lambda damage: math.nan)


def test_a_zero_baseline_is_refused_before_any_trial() -> None:
    compressor = Synthetic()
    with pytest.raises(ConfigError, match="the baseline scores 0"):
        search(compressor, Judge(AccuracyCriterion(), lambda model: 0.0))
    with pytest.raises(ConfigError, match="the baseline scores 0"):
        search(compressor, Judge(AccuracyCriterion(), lambda model: 1.0, lambda model: 0.0))
    assert compressor.built == []


def test_the_confirming_function_is_asked_only_where_it_would_do() -> None:
    asked = []

    def confirming(model: nn.Module) -> float:
        asked.append(damage_of(model))
        return 1.0 - power(2e-5)(damage_of(model))

    outcome = find(power(1e-4), confirm_func=confirming)
    assert outcome.met
    assert asked == [0.0, *(trial.damage for trial in outcome.trials if trial.loss <= 0.01)]
    assert any(trial.loss <= 0.01 and not trial.met for trial in outcome.trials), "met, and not confirmed"
    assert best(outcome).damage <= 2e-5
    assert excess(outcome, 2e-5) <= 1.06


def test_samples_are_confirmed_on_the_odd_ones() -> None:
    """What the odd samples lose is five times what the search sees: they decide."""

    def score(model: nn.Module) -> np.ndarray:
        loss = power(1e-4)(damage_of(model))
        return np.tile([1.0 - loss, 1.0 - 5 * loss], 50)

    outcome = outcome_of(search(Synthetic(), Judge(absolute(0.01), score)))
    assert outcome.met
    assert outcome.confirmation is not None
    assert outcome.confirmation.loss == pytest.approx(5 * best(outcome).loss)
    assert 0.75 * 2e-5 <= best(outcome).damage <= 2e-5 * 1.0001


def test_a_coarse_compressor_is_never_asked_for_the_same_plan_twice() -> None:
    """Plans exist only at factors 4 of damage."""

    class Coarse(Synthetic):
        def at_damage(self, damage: float) -> OperatingPoint:
            return super().at_damage(max(self.least, 4.0 ** math.floor(math.log(damage, 4) + 1e-9)))

    compressor = Coarse(least=4.0**-12, most=0.25)
    outcome = find(power(3e-4), compressor)
    assert outcome.met
    assert best(outcome).damage == 4.0**-6
    assert len({point.damage for point in compressor.built}) == len(compressor.built)


@settings(deadline=None, max_examples=20)
@given(st.floats(-4, -2).map(lambda power: 10**power), st.floats(0.5, 2))
def test_scores_in_other_units_give_the_same_trials(place: float, slope: float) -> None:
    law = power(place, slope)
    plain = find(law)
    scaled = find(lambda damage: 1024 * law(damage), tolerable_loss=1024 * 0.01, baseline=0.0)
    assume(len(plain.trials) == len(scaled.trials))
    assert [trial.damage for trial in plain.trials] == pytest.approx([t.damage for t in scaled.trials], rel=1e-6)
