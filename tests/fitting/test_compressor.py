"""The compressor behind the search: offers at any damage, and models that keep them."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pared
from pared import AccuracyCriterion, PostTrainingQuantConfig, Rule
from pared.fitting.calibration import observe, sensitivity
from pared.fitting.rounding.targets import solve
from pared.fitting.search import allocate, options
from pared.fitting.search import compressor as workshop
from pared.fitting.search.compressor import Compressor
from pared.fitting.search.search import Judge, search
from pared.fitting.search.workspace import Workspace
from pared.model import storage
from pared.model.tensors import find_tensors
from pared.runtime import quantized
from pared.runtime.record import record_of


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


def compressor(**settings: Any) -> Compressor[Net]:
    torch.manual_seed(0)
    model = Net().eval()
    seen = observe.collect(model, BATCHES, 1000)
    measured = sensitivity.measure(model, seen.calls, seen.energies, 0)
    return Compressor(model, find_tensors(model), PostTrainingQuantConfig(**settings), seen, measured)


@pytest.fixture(scope="module")
def shop() -> Compressor[Net]:
    return compressor()


DAMAGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@pytest.mark.slow
def test_more_damage_takes_fewer_bytes(shop: Compressor[Net]) -> None:
    offers = [shop.offer(damage) for damage in DAMAGES]
    assert all(a.nbytes > b.nbytes and a.price < b.price for a, b in itertools.pairwise(offers))
    assert [offer.damage for offer in offers] == list(DAMAGES)
    assert 0 < shop.least < 1e-5
    assert shop.most > 0.1


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.slow
def test_an_offer_is_kept(shop: Compressor[Net], damage: float) -> None:
    offer = shop.offer(damage)
    assert shop.offer(offer.damage) == offer
    one, other = (storage.to_bytes(quantized.contents_of(shop.build(offer))) for _ in range(2))
    assert one == other
    assert len(one) == pytest.approx(offer.nbytes, rel=0.02, abs=500)  # real models: 0.2 %, see bench.figures


def test_predicted_damage_is_about_what_is_measured(shop: Compressor[Net]) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    unseen = torch.randint(0, 400, (64, 20), generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        exact = model(unseen)
        for damage in (1e-4, 1e-3, 1e-2):
            lost = float((shop.build(shop.offer(damage))(unseen) - exact).square().sum() / exact.square().sum())
            assert 0.4 < lost / damage < 2.5


@pytest.mark.parametrize("nbytes", [20_000, 26_000, 40_000])
def test_bytes_are_kept_and_used(shop: Compressor[Net], nbytes: int) -> None:
    real = quantized.nbytes(shop.build(shop.offer_bytes(nbytes)))
    assert 0.96 * nbytes < real <= nbytes


@pytest.mark.slow
def test_only_what_changed_is_rounded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = compressor(approach="weight_only")
    rounded: list[Any] = []

    def counted(*args: Any) -> Any:
        rounded.append(args[0])
        return solve(*args)

    monkeypatch.setattr(options, "solve", counted)
    shop.build(shop.offer(1e-3))
    first = len(rounded)
    shop.build(shop.offer(1e-3))
    assert len(rounded) == first
    shop.build(shop.offer(1.05e-3))
    assert first < len(rounded) < 2 * first, "a little more damage changes a few tensors only"


def test_blame_is_the_whole_damage(shop: Compressor[Net]) -> None:
    found = shop.blame(shop.offer(1e-2))
    assert sum(share for _, share in found) == pytest.approx(1.0)
    assert [share for _, share in found] == sorted((share for _, share in found), reverse=True)
    assert any("(input, " in name for name, _ in found)


def test_inputs_get_their_share_of_the_damage(shop: Compressor[Net]) -> None:
    for damage in DAMAGES:
        inputs = sum(share for name, share in shop.blame(shop.offer(damage)) if "(input, " in name)
        assert inputs <= workshop.ACTIVATION_SHARE + 0.02


@pytest.mark.slow
def test_rules_stand() -> None:
    shop = compressor(rules=[Rule("head", bits=5), Rule("gru.*", keep=True)])
    lines = {line.name: line for line in quantized.plan_of(shop.build(shop.offer(1e-2)))}
    assert lines["head.weight"].bits == 5
    assert lines["gru.weight_hh_l0"].treatment == "exact"


def test_words_never_seen_are_no_coarser_than_ordinary_ones(shop: Compressor[Net]) -> None:
    step = shop.build(shop.offer(1e-2)).state_dict()["table.weight_step"]
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
def test_the_blamed_are_those_of_the_plan_that_was_tried(resumed: bool, tmp_path: Path) -> None:
    """Within a size the plan is filled up: at its price alone, another plan would be blamed for other shares."""
    shop, size = compressor(), 26_000
    assert allocate.choose(shop._options, shop.offer_bytes(size).price).options != shop.offer_bytes(size).choice.options
    judge = Judge(AccuracyCriterion(tolerable_loss=0.0), lambda model: float(model is original), max_trials=1)
    original = Net().eval()
    for _ in range(1 + resumed):
        records = Workspace(tmp_path, {}) if resumed else None
        found = search(shop, original, judge, max_size=size, workspace=records, start=shop.least)
    blamed = record_of(found).outcome.blame
    damages = {line.name: line.damage for line in quantized.plan_of(shop.build(shop.offer_bytes(size)))}
    name, other, *_ = (name for name, _ in blamed if name in damages)
    assert damages[name] / damages[other] == pytest.approx(dict(blamed)[name] / dict(blamed)[other])
    assert list(blamed) == shop.blame(shop.offer_bytes(size))[: len(blamed)]
