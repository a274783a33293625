"""The compressor behind the search: an operating point at any damage, and models that keep what it says."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pared
from pared import AccuracyCriterion, PostTrainingQuantConfig, Rule, allocate
from pared.fitting.calibration import observe, sensitivity
from pared.fitting.rounding.targets import solve
from pared.fitting.search.compressor import ACTIVATION_SHARE, Compressor
from pared.fitting.search.free import on_grids
from pared.fitting.search.search import Judge, search
from pared.fitting.search.workspace import Workspace
from pared.model import storage
from pared.model.tensors import find_tensors
from pared.runtime import quantized
from pared.runtime.record import Result, contents_of, record_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(500, 32)
        self.conv = nn.Conv1d(32, 64, 3, padding=1)
        self.depthwise = nn.Conv1d(64, 64, 5, groups=64, padding=2)
        self.gru = nn.GRU(64, 48, batch_first=True)
        self.head = nn.Linear(48, 40)

    def forward(self, ids: torch.Tensor) -> Any:
        h = self.depthwise(self.conv(self.table(ids).mT).relu()).mT
        return self.head(self.gru(h)[0])


BATCHES = [torch.randint(0, 400, (4, 20), generator=torch.Generator().manual_seed(i)) for i in range(8)]


def make_compressor(**settings: Any) -> Compressor[Net]:
    torch.manual_seed(0)
    model = Net().eval()
    seen = observe.collect(model, BATCHES, 1000)
    measured = sensitivity.measure(find_tensors(model), seen.calls, seen.energies, 0)
    return Compressor(find_tensors(model), PostTrainingQuantConfig(**settings), seen, measured)


@pytest.fixture(scope="module")
def compressor() -> Compressor[Net]:
    return make_compressor()


DAMAGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@pytest.mark.slow
def test_more_damage_takes_fewer_bytes(compressor: Compressor[Net]) -> None:
    points = [compressor.at_damage(damage) for damage in DAMAGES]
    assert all(a.nbytes > b.nbytes and a.price < b.price for a, b in itertools.pairwise(points))
    assert [point.damage for point in points] == list(DAMAGES)
    assert 0 < compressor.least < 1e-5
    assert compressor.most > 0.1


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.slow
def test_a_model_is_what_its_operating_point_says(compressor: Compressor[Net], damage: float) -> None:
    point = compressor.at_damage(damage)
    assert compressor.at_damage(point.damage) == point
    one, other = (storage.to_bytes(contents_of(compressor.build(point))) for _ in range(2))
    assert one == other
    assert len(one) == pytest.approx(point.nbytes, rel=0.02, abs=500)  # real models: 0.2 %, see bench.figures


@pytest.mark.slow
def test_predicted_damage_is_about_what_is_measured(compressor: Compressor[Net]) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    unseen = torch.randint(0, 400, (64, 20), generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        exact = model(unseen)
        for damage in (1e-4, 1e-3, 1e-2):
            output = compressor.build(compressor.at_damage(damage))(unseen)
            lost = float((output - exact).square().sum() / exact.square().sum())
            assert 0.4 < lost / damage < 2.5


@pytest.mark.parametrize("nbytes", [20_000, 26_000, 40_000])
def test_bytes_are_kept_and_used(compressor: Compressor[Net], nbytes: int) -> None:
    real = quantized.nbytes(compressor.build(compressor.within_bytes(nbytes)))
    assert 0.96 * nbytes < real <= nbytes


@pytest.mark.slow
def test_only_what_changed_is_rounded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = make_compressor(approach="weight_only")
    rounded: list[Any] = []

    def counted(*args: Any) -> Any:
        rounded.append(args[0])
        return solve(*args)

    monkeypatch.setattr(on_grids, "solve", counted)
    compressor.build(compressor.at_damage(1e-3))
    first = len(rounded)
    compressor.build(compressor.at_damage(1e-3))
    assert len(rounded) == first
    compressor.build(compressor.at_damage(1.05e-3))
    assert first < len(rounded) < 2 * first, "a little more damage changes a few tensors only"


def test_contributors_add_up_to_the_whole_damage(compressor: Compressor[Net]) -> None:
    found = compressor.contributors(compressor.at_damage(1e-2))
    assert sum(share for _, share in found) == pytest.approx(1.0)
    assert [share for _, share in found] == sorted((share for _, share in found), reverse=True)
    assert any("(input, " in name for name, _ in found)


def test_inputs_get_their_share_of_the_damage(compressor: Compressor[Net]) -> None:
    for damage in DAMAGES:
        contributors = compressor.contributors(compressor.at_damage(damage))
        inputs = sum(share for name, share in contributors if "(input, " in name)
        assert inputs <= ACTIVATION_SHARE + 0.02


@pytest.mark.slow
def test_rules_stand() -> None:
    compressor = make_compressor(rules=[Rule("head", bits=5), Rule("gru.*", keep=True)])
    lines = {line.name: line for line in Result(compressor.build(compressor.at_damage(1e-2))).plan}
    assert lines["head.weight"].bits == 5
    assert lines["gru.weight_hh_l0"].treatment == "exact"


def test_words_never_seen_are_no_coarser_than_ordinary_ones(compressor: Compressor[Net]) -> None:
    step = compressor.build(compressor.at_damage(1e-2)).state_dict()["table.weight_step"]
    seen = torch.zeros(500, dtype=torch.bool)
    seen[torch.cat([b.reshape(-1) for b in BATCHES])] = True
    assert float(step[~seen].max()) <= float(step[seen].sort().values[int(seen.sum()) // 2]) * 1.001


def test_a_weight_that_hardly_matters_is_not_wiped_out() -> None:
    torch.manual_seed(0)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
            self.faint = nn.Linear(64, 64, bias=False)

        def forward(self, x: torch.Tensor) -> Any:
            return self.loud(x) + 1e-4 * self.faint(x)

    net = Sum()
    q = pared.fit(net, PostTrainingQuantConfig(approach="weight_only"), [torch.randn(64, 64) for _ in range(4)])
    ours, theirs = q.faint.weight.detach(), net.faint.weight.detach()
    assert float((ours - theirs).square().mean() / theirs.square().mean()) < 0.3


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.slow
def test_contributors_are_those_of_the_plan_that_was_tried(resumed: bool, tmp_path: Path) -> None:
    """Within a size the plan is filled up: at its price alone, another plan would be named, with other shares."""
    compressor, size = make_compressor(), 26_000
    point = compressor.within_bytes(size)
    assert allocate.choose(compressor._options, point.price).options != point.choice.options
    judge = Judge(AccuracyCriterion(tolerable_loss=0.0), lambda model: float(type(model) is Net), max_trials=1)
    for _ in range(1 + resumed):
        records = Workspace(tmp_path, {}) if resumed else None
        found = search(compressor, judge, max_size=size, workspace=records, start=compressor.least)
    contributors = record_of(found).outcome.contributors
    damages = {line.name: line.damage for line in Result(compressor.build(point)).plan}
    name, other, *_ = (name for name, _ in contributors if name in damages)
    assert damages[name] / damages[other] == pytest.approx(dict(contributors)[name] / dict(contributors)[other])
    assert list(contributors) == compressor.contributors(point)[: len(contributors)]
