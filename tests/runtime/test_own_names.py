"""A model's own names stay its own, and where it has none, ours tell what came of `fit`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import AccuracyCriterion, ModelError, PostTrainingQuantConfig
from tests.runtime.copies import copies

pytestmark = pytest.mark.slow  # almost every test here fits a whole model


class Named(nn.Module):
    """Has attributes with our names, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(8, 4)
        self.plan = "mine"

    def save(self) -> str:
        return "saved my way"

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.score(x)
        return out


def test_a_models_own_names_stay_its_own(tmp_path: Path) -> None:
    q = pared.fit(Named())
    assert isinstance(q.score, nn.Linear)
    assert q.plan == "mine"
    assert q.save() == "saved my way"
    assert "met" in dir(type(q))
    assert pared.save(q, tmp_path).exists()
    assert "score.weight" in pared.report(q)


NAMES = (
    *("save", "report", "export", "pared", "met", "score", "baseline", "trials"),
    *("plan", "curve", "nbytes", "engine", "engine_ms"),
)
OLD_NAMES = ("met", "score", "baseline", "trials", "plan", "engine", "engine_ms")


class Writing(nn.Module):
    """A model whose forward writes all of our names, as an ordinary model may."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        for name in NAMES:
            setattr(self, name, WRITTEN[self.kind](out))
        return out


WRITTEN: dict[str, Callable[[Tensor], object]] = {
    "number": lambda out: float(out.detach().sum()),
    "tensor": lambda out: out,
    "none": lambda _: None,
    "module": lambda _: nn.Identity(),
    "parameter": lambda out: nn.Parameter(out.detach(), requires_grad=False),
    "buffer": lambda out: nn.Buffer(out.detach(), persistent=False),
}


@pytest.mark.parametrize("memory", ["fast", "small"])
@pytest.mark.parametrize("kind", WRITTEN)
def test_a_models_forward_may_write_every_name_of_ours(kind: str, memory: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Writing(kind), torch.randn(4, 16)
    quantized = pared.fit(model, PostTrainingQuantConfig(approach="static"), [x])
    pared.save(quantized, tmp_path)
    q: Any = pared.load(tmp_path, model=Writing(kind), memory=memory)
    assert q.met is q.pared.met is None
    assert q.plan == q.pared.plan
    before = q.state_dict()
    for call in range(3):
        with torch.no_grad():
            out = q(x + call)
        expected = WRITTEN[kind](out)
        for name in NAMES:
            found = getattr(q, name)
            assert torch.equal(found, out) if isinstance(expected, Tensor) else type(found) is type(expected)
            assert kind != "number" or found == expected
    if kind not in ("parameter", "buffer"):  # those change what the model is made of, as in every module
        assert all(torch.equal(before[name], tensor) for name, tensor in q.state_dict().items())
        assert "Linear" in repr(q)
        assert pared.save(q, tmp_path / "again").read_bytes() == (tmp_path / "best_model.pt").read_bytes()
        assert "layer.weight" in pared.report(q)
        for clone in (way(q) for way in copies().values()):
            with torch.no_grad():
                assert torch.equal(clone(x), q(x))
            assert type(clone.score) is type(q.score)
    del q.score
    assert q.score is None, "ours is there again"


class Telling(nn.Module):
    """Uses our names as words, and for nothing of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"score": self.layer(x), "pared": x}


def test_a_word_in_the_code_of_a_model_stays_a_word() -> None:
    q: Any = pared.fit(Telling(), calib_dataloader=[torch.randn(4, 16)], quiet=True)
    assert q.score is q.pared.score is None
    assert set(q(torch.randn(2, 16))) == {"score", "pared"}


class Lazy(nn.Module):
    """Asks for attributes with our names before it sets them, as many models do with what they cache."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    @property
    def engine(self) -> str:
        raise RuntimeError("call forward first")

    @property
    def met(self) -> bool:
        if not hasattr(self, "report"):
            raise AttributeError("not known yet")
        return bool(self.report)

    def cached(self) -> float:
        try:
            return float(self.score)
        except AttributeError:
            self.score: float = 1.0
        return self.score

    def forward(self, x: Tensor) -> Tensor:
        if getattr(self, "report", None) is None:
            self.report = {"calls": 0}
        self.report["calls"] += 1
        scales = [self.plan for _ in range(1) if hasattr(self, "plan")] or [torch.ones(8)]
        self.plan: Tensor = scales[0]
        out: Tensor = self.layer(x) * self.plan * self.cached()
        return out


def _agreement(reference: nn.Module, x: Tensor) -> Callable[[nn.Module], float]:
    return lambda model: -1 - float((model(x) - reference(x)).detach().square().mean())


def test_a_model_may_ask_for_names_of_ours_before_it_sets_them() -> None:
    x = torch.randn(64, 16)
    model = Lazy().eval()
    q: Any = pared.fit(model, None, [x], _agreement(model.layer, x))
    assert q.pared.met is True
    assert not hasattr(q, "met"), "its own property says so"
    with pytest.raises(RuntimeError, match="call forward first"):
        _ = q.engine
    q(x)
    assert q.met is True
    assert q.report == {"calls": 1}
    assert (q.score, q.plan.tolist()) == (1.0, [1.0] * 8)
    assert q.trials == q.pared.trials, "of which its code knows nothing"
    assert "layer.weight" in pared.report(q)
    assert callable(q.save)


def test_a_module_that_has_a_name_of_ours_may_be_exchanged() -> None:
    q: Any = pared.fit(nn.Sequential(nn.Linear(16, 8)))
    for add in (q.register_parameter, q.register_buffer, q.add_module):
        with pytest.raises(TypeError):
            add("score", "neither")
        assert q.score is None
    q.register_buffer("score", torch.ones(2))
    assert q.score.tolist() == [1.0, 1.0]
    with pytest.raises(KeyError, match="attribute 'score' already exists"):
        q.register_parameter("score", nn.Parameter(torch.ones(2)))
    with pytest.raises(KeyError, match="attribute 'training' already exists"):
        q.register_buffer("training", torch.ones(2))


def test_one_attribute_tells_what_came_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8)), [torch.randn(32, 48)]
    criterion = AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=1e-2)
    conf = PostTrainingQuantConfig(accuracy_criterion=criterion)
    with torch.no_grad():
        expected = model(batches[0])

    @torch.no_grad()
    def lost(net: nn.Module) -> float:
        return float((net(batches[0]) - expected).square().mean())

    q: Any = pared.fit(model, conf, batches, lost)
    for name in OLD_NAMES:
        assert getattr(q, name) == getattr(q.pared, name), name
    assert (q.pared.met, q.pared.baseline, q.pared.engine) == (True, 0.0, "torch")
    assert q.pared.score == q.pared.trials[-1].score or len(q.pared.trials) > 1
    assert q.pared.curve == q.curve()
    assert q.pared.nbytes() == q.nbytes == q.save(tmp_path).stat().st_size
    assert repr(q.pared).startswith("<pared: met=True, score=")
    with pytest.raises(AttributeError):
        q.pared.met = False
    loaded: Any = pared.load(tmp_path, model=model)
    assert loaded.pared.score == q.pared.score
    with pytest.raises(ModelError, match="has no trade-off curve"):
        loaded.pared.curve  # noqa: B018  # a property that raises
