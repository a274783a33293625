"""`fit` from end to end on small networks: each row of its table, and what it promises."""

import copy
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import AccuracyCriterion, ConfigError, PostTrainingQuantConfig, Rule
from pared.runtime.record import record_of
from tests.fitting.small_network import BATCHES, MODEL, build, conf, lost, size

pytestmark = pytest.mark.slow  # almost every test here fits a whole model


def test_without_a_goal_a_thousandth_of_the_energy_is_lost() -> None:
    q = pared.fit(MODEL, None, BATCHES)
    assert q.met is None
    assert 2e-4 < lost(q).mean() < 2e-3
    assert q.nbytes < pared.fit(MODEL, PostTrainingQuantConfig(quant_level=0), BATCHES).nbytes


@pytest.mark.parametrize("calibration", [None, BATCHES])
def test_level_0_without_a_goal_is_eight_bits_everywhere(calibration: list[Tensor] | None) -> None:
    q = pared.fit(MODEL, PostTrainingQuantConfig(quant_level=0), calibration)
    assert {line.bits for line in q.plan if line.treatment == "grid"} == {8.0}


@pytest.mark.parametrize("nbytes", [9_000, 11_111, 20_000])
@pytest.mark.parametrize("calibration", [None, BATCHES])
def test_max_size_is_kept_in_the_file_and_used(nbytes: int, calibration: Any, tmp_path: Path) -> None:
    q = pared.fit(MODEL, PostTrainingQuantConfig(max_size=nbytes), calibration)
    assert 0.88 * nbytes < size(q, tmp_path) <= nbytes
    assert q.met is None
    assert len(q.trials) == 0


def test_more_bytes_lose_less() -> None:
    losses = [
        lost(pared.fit(MODEL, PostTrainingQuantConfig(max_size=n, approach="weight_only"), BATCHES)).mean()
        for n in (8_000, 12_000, 20_000, 40_000)
    ]
    assert all(more > less for more, less in itertools.pairwise(losses))


def test_calibration_makes_the_same_bytes_better() -> None:
    given = PostTrainingQuantConfig(max_size=10_000, approach="weight_only")
    assert lost(pared.fit(MODEL, given, BATCHES)).mean() < 0.95 * lost(pared.fit(MODEL, given)).mean()


def test_a_size_that_nothing_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_size is 2,000 bytes, and the smallest file takes \d,\d\d\d"):
        pared.fit(MODEL, PostTrainingQuantConfig(max_size=2_000), BATCHES)


@pytest.mark.parametrize("loss", [1e-4, 1e-3, 1e-2])
def test_the_criterion_is_met_and_what_may_be_lost_is_lost(loss: float, tmp_path: Path) -> None:
    q = pared.fit(MODEL, conf(loss), BATCHES, lost)
    assert q.met
    assert q.baseline == 0
    assert 0.5 * loss < q.score <= loss
    assert len(q.trials) <= 5
    assert size(q, tmp_path) == q.nbytes
    (tmp_path / "engine.json").unlink()
    loaded = pared.load(tmp_path, model=build())
    assert float(lost(loaded)[::2].mean()) == pytest.approx(q.score, rel=1e-5)


def test_looser_criteria_give_smaller_files() -> None:
    sizes: list[int] = [pared.fit(MODEL, conf(loss), BATCHES, lost).nbytes for loss in (1e-4, 1e-3, 1e-2)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_higher_score_may_be_better() -> None:
    criterion = AccuracyCriterion(tolerable_loss=0.01)
    q = pared.fit(MODEL, PostTrainingQuantConfig(accuracy_criterion=criterion), BATCHES, lambda m: 1 - lost(m))
    assert q.met
    assert 0.98 < q.score < 1


def test_a_goal_out_of_reach_gives_the_best_and_the_truth() -> None:
    q = pared.fit(MODEL, conf(0.0, max_trials=3), BATCHES, lambda m: float(lost(m).mean()) + 1e-3 * (m is not MODEL))
    outcome = record_of(q).outcome
    assert outcome.met is False
    assert outcome.gap is not None
    assert outcome.gap > 0
    assert outcome.contributors
    assert {name.partition(" (")[0] for name, _ in outcome.contributors} <= {n for n, _ in MODEL.named_parameters()} | {
        n for n, _ in MODEL.named_modules()
    }
    assert "NOT met" in q.report()


def test_both_goals_the_best_within_the_bytes(tmp_path: Path) -> None:
    q = pared.fit(MODEL, conf(1e-6, max_size=9_000), BATCHES, lost)
    assert q.met is False
    assert size(q, tmp_path) <= 9_000


def test_level_0_does_no_more_damage_than_eight_bits() -> None:
    eight = lost(pared.fit(MODEL, PostTrainingQuantConfig(quant_level=0, approach="weight_only"))).mean()
    q = pared.fit(MODEL, conf(0.05, quant_level=0, approach="weight_only"), BATCHES, lost)
    assert q.met
    assert lost(q).mean() < 2 * eight


def assert_nothing_is_coarser_than_eight_bits(model: nn.Module) -> None:
    """Of each row on a grid the step is at most absmax / 127 of the float weight."""
    state, floats = model.state_dict(), dict(MODEL.named_parameters())
    steps = {name.removesuffix("_step"): step for name, step in state.items() if name.endswith("_step")}
    assert steps
    for name, step in steps.items():
        weight = floats[name].detach()
        rows = weight.abs().amax(1, keepdim=True) if weight.dim() > 1 else weight.abs().amax()
        assert bool((step.reshape(rows.shape) <= rows / 127 * (1 + 1e-6)).all()), name


@pytest.mark.parametrize("approach", ["weight_only", "static"])
@pytest.mark.parametrize("size", [None, 20_000, 30_000])
@pytest.mark.parametrize("loss", [None, 1e-6, 0.05])
def test_level_0_makes_nothing_coarser_than_eight_bits(approach: str, size: int | None, loss: float | None) -> None:
    given = conf(loss or 0.0, quant_level=0, max_size=size, approach=approach, max_trials=3)
    q = pared.fit(MODEL, given, BATCHES, None if loss is None else lost)
    assert_nothing_is_coarser_than_eight_bits(q)
    assert size is None or q.nbytes <= size
    if loss == 0.05:
        assert q.met
        assert {line.bits for line in q.plan if line.treatment == "grid"} == {8.0}, "the smallest that is allowed"


@pytest.mark.parametrize("calibration", [None, BATCHES])
def test_level_0_without_data_and_with_a_size(calibration: Any) -> None:
    q = pared.fit(MODEL, PostTrainingQuantConfig(quant_level=0, max_size=20_000), calibration)
    assert_nothing_is_coarser_than_eight_bits(q)


@pytest.mark.parametrize("function", [None, lost])
def test_a_size_that_eight_bits_do_not_reach_is_refused(function: Any) -> None:
    given = conf(1e-2, quant_level=0, max_size=9_000)
    with pytest.raises(ConfigError, match=r"smallest file takes 1\d,\d\d\d\n.*quant_level=0 allows nothing coarser"):
        pared.fit(MODEL, given, BATCHES, function)


@pytest.mark.parametrize("scored", [False, True])
def test_level_0_holds_in_the_trade_off(scored: bool) -> None:
    seen: list[nn.Module] = []

    def score(model: nn.Module) -> float:
        seen.append(model)
        return float(lost(model).mean())

    given = conf(quant_level=0, approach="weight_only")
    trade_off = pared.trade_off(MODEL, given, BATCHES, score if scored else None)
    eight = pared.fit(MODEL, given, BATCHES).nbytes
    assert min(point.nbytes for point in trade_off.points) == pytest.approx(eight, rel=0.05)
    assert scored or all(a.nbytes > b.nbytes for a, b in itertools.pairwise(trade_off.points))
    for model in seen[1:]:
        assert_nothing_is_coarser_than_eight_bits(model)
    assert len(seen) == (len(trade_off.points) + 1 if scored else 0)


def test_rules_hold_in_a_search() -> None:
    rules = [Rule("0", bits=6), Rule("5.*", keep=True, because="the last word")]
    q = pared.fit(MODEL, conf(1e-3, rules=rules), BATCHES, lost)
    lines = {line.name: line for line in q.plan}
    assert lines["0.weight"].bits == 6
    assert lines["5.weight"].treatment == "exact"
    assert lines["5.weight"].because == "the last word"
    assert lines["3.weight"].bits not in (None, 8.0)


@pytest.mark.parametrize("approach", ["static", "dynamic", "weight_only", "auto"])
def test_approaches(approach: str) -> None:
    q = pared.fit(MODEL, conf(1e-3, approach=approach), BATCHES, lost)
    assert q.met
    modes = {activation.mode for activation in record_of(q).activations.values()}
    allowed = {"static": {"static"}, "dynamic": {"dynamic"}, "weight_only": set(), "auto": {"static", "dynamic"}}
    assert modes <= allowed[approach]


@pytest.mark.child
def test_the_same_search_gives_the_same_file_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys, pared; from tests.fitting.small_network import *; "
        "pared.save(pared.fit(build(), conf(1e-3), BATCHES, lost, quiet=True), sys.argv[1])"
    )
    for run in ("one", "other"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / run)], check=True, capture_output=True)
    one, other = ((tmp_path / run / "best_model.pt").read_bytes() for run in ("one", "other"))
    assert one == other


def test_a_workspace_saves_evaluations(tmp_path: Path) -> None:
    calls = []

    def counted(model: nn.Module) -> Any:
        calls.append(model)
        return lost(model)

    first = pared.fit(MODEL, conf(1e-3), BATCHES, counted, workspace=tmp_path / "w")
    made = len(calls)
    again = pared.fit(MODEL, conf(1e-3), BATCHES, counted, workspace=tmp_path / "w")
    assert len(calls) == made
    assert size(first, tmp_path / "a") == size(again, tmp_path / "b")
    assert (tmp_path / "a/best_model.pt").read_bytes() == (tmp_path / "b/best_model.pt").read_bytes()
    with pytest.raises(ConfigError, match="configuration"):
        pared.fit(MODEL, conf(1e-2), BATCHES, counted, workspace=tmp_path / "w")
    other = copy.deepcopy(MODEL)
    other[0].weight.data += 1
    with pytest.raises(ConfigError, match="model"):
        pared.fit(other, conf(1e-3), BATCHES, counted, workspace=tmp_path / "w")


def test_a_workspace_takes_models_with_single_numbers(tmp_path: Path) -> None:
    """A BatchNorm counts its batches in a tensor without dimensions, which the fingerprint has to get through."""
    model = nn.Sequential(nn.Linear(48, 16), nn.BatchNorm1d(16)).eval()
    wanted = PostTrainingQuantConfig(max_trials=1)
    for _ in range(2):
        q = pared.fit(model, wanted, BATCHES, lambda _: 1.0, workspace=tmp_path / "w")
    assert q.pared.met
    assert len(q.pared.trials) == 1


def test_the_trade_off_curve() -> None:
    q = pared.fit(MODEL, conf(1e-3), BATCHES, lost)
    found = q.curve()
    assert len(found.points) >= 8
    assert sum(point.score is not None for point in found.points) == len(q.trials)
    planned = [point for point in found.points if point.score is None]
    assert all(a.nbytes > b.nbytes and a.damage < b.damage for a, b in itertools.pairwise(planned))
    scored = pared.trade_off(MODEL, conf(), BATCHES, lambda m: float(lost(m).mean()), points=4)
    assert scored.baseline == 0
    assert all(a.score < b.score for a, b in itertools.pairwise(scored.points))
    assert "bytes" in str(scored)


def test_a_loaded_model_has_no_curve(tmp_path: Path) -> None:
    loaded = pared.load(pared.save(pared.fit(MODEL), tmp_path), model=build())
    with pytest.raises(pared.ModelError, match="has no trade-off curve"):
        loaded.curve()


def test_the_model_is_untouched() -> None:
    before = copy.deepcopy(MODEL.state_dict())
    pared.fit(MODEL, conf(1e-3), BATCHES, lost)
    assert all(torch.equal(before[name], value) for name, value in MODEL.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in MODEL.parameters())
