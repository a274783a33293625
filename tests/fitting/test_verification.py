"""Copies use their own weights, files give the model that fit returns, and nothing of the user's changes."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared import ModelError, PostTrainingQuantConfig
from pared.fitting.verification.reloading import check_reloading
from pared.model.calls import Call
from pared.model.copies import shadow
from pared.model.tensors import find_tensors
from tests.model.entangled import LAYERS, LooksUp, X, build, wrapped
from tests.ratios import snr

CONF = PostTrainingQuantConfig(quant_level=0, approach="weight_only")
ROUTES: dict[str, Any] = {}


class Routed(nn.Module):
    """Reaches its layer through a function that looks it up in a global variable."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)
        ROUTES["layer"] = self.layer

    def forward(self, x: Tensor) -> Any:
        return route("layer", self.first(x))


def route(name: str, x: Tensor) -> Any:
    return ROUTES[name](x)


class Cached(nn.Module):
    """Keeps what it computes from a weight, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.way = way
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Any:
        weight = self.layer.weight.detach()
        if "w" not in self.kept:
            self.kept["w"] = {
                "transposed": weight.T.contiguous(),
                "scaled": weight / weight.norm(),
                "masked": weight * (weight > 0),
                "concatenated": torch.cat([torch.ones(2, 4), weight, weight]),
            }[self.way]
        kept = self.kept["w"]
        kept = {"transposed": kept.T, "concatenated": kept[2:6]}.get(self.way, kept)
        return F.linear(self.first(x), kept)


class Keeping(nn.Module):
    """Keeps its last output, and gives it again for the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.last is None or not torch.equal(self.last[0], x):
            self.last = x.clone(), self.layer(x).detach()
        return self.last[1]


class Hidden(nn.Module):
    """Has a layer in a list, which registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(4, 4), [nn.Linear(4, 4)]

    def forward(self, x: Tensor) -> Any:
        return self.rest[0](self.first(x))


def used(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model(X)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "global": (Routed, "layer.weight: is read from the model itself when a copy of the model runs"),
    "transposed": (lambda: used(Cached("transposed")), "kept: is read in the place of layer.weight, from which it w"),
    "scaled": (lambda: used(Cached("scaled")), "kept: is read in the place of layer.weight"),
    "masked": (lambda: used(Cached("masked")), "kept: is read in the place of layer.weight"),
    "concatenated": (lambda: used(Cached("concatenated")), "kept: is read in the place of layer.weight"),
    "an output": (lambda: used(Keeping()), "Keeping: no weight is read when a copy runs on the first calibration ca"),
    "memoized": (lambda: used(wrapped("memoized")), "Sequential: no weight is read when a copy runs"),
    "unregistered": (Hidden, "rest: is or holds a parameter that the model reads and that is not registered"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("verb", [pared.fit, pared.estimate, pared.trade_off])
def test_a_model_whose_copies_do_not_use_their_weights_is_refused(what: str, verb: Any) -> None:
    make, words = REFUSED[what]
    approach = PostTrainingQuantConfig()
    with pytest.raises(ModelError) as error:
        verb(make().eval(), approach, [X])
    assert words in str(error.value)


@pytest.mark.parametrize("make", [lambda: Cached("transposed"), Keeping])
def test_a_cache_that_is_still_empty_is_no_reason(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    q = pared.fit(make().eval(), CONF, [X], quiet=True)
    loaded = pared.load(pared.save(q, tmp_path), model=make())
    with torch.no_grad():
        assert torch.equal(loaded(X), q(X))


class Biased(nn.Module):
    """Keeps what it computes from a weight until it is trained, as LeViT does with its table of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))
        self.cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Any:
        if self.training:
            return self.layer(x) @ self.table.tanh()
        if "cpu" not in self.cache:
            self.cache["cpu"] = self.table.tanh()
        return self.layer(x) @ self.cache["cpu"]


class Adapted(Biased):
    """Adds an adapter to its weight whenever it leaves training, which rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter, self.added = nn.Parameter(torch.randn(8, 8) / 3), False

    @torch.no_grad()
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode == self.added:
            self.layer.weight += -self.adapter if mode else self.adapter
            self.added = not mode
        return self


class Untrainable(Biased):
    """Cannot be trained."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise AssertionError("for inference only")
        return super().train(mode)


@pytest.mark.parametrize("cls", [Biased, Adapted])
def test_what_is_kept_until_training_is_computed_again_from_other_weights(cls: type[Biased], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, make = torch.randn(16, 8), nn.Sequential
    model = make(cls(), cls()).eval()
    with torch.no_grad():
        expected = model(x)
        before = {name: one.clone() for name, one in model.state_dict().items()}
        kept = [one.cache["cpu"] for one in model.children()]
        q = pared.fit(model, CONF, [x], quiet=True)
        found = q(x)
        assert snr(found, expected) > 30
        used = make(cls(), cls()).eval()
        used(x)
        loaded = pared.load(pared.save(q, tmp_path), model=used)
        assert torch.equal(loaded(x), found)
        assert torch.equal(copy.deepcopy(q)(x), found)
        # Other weights in a copy have an effect, and those of the model are as they were.
        other = shadow(model)
        for name, one in other.named_parameters():
            assert torch.equal(one, before[name]), name
            one.copy_(torch.randn_like(one))
        assert snr(other(x), expected) < 10
        assert all(one.cache["cpu"] is tensor for one, tensor in zip(model.children(), kept, strict=True))
        assert not any(one.training for one in (*other.modules(), *q.modules(), *model.modules()))


def test_what_is_kept_by_a_module_that_cannot_be_trained_is_refused() -> None:
    model = Untrainable()
    for one in model.modules():
        one.training = False
    model(torch.randn(16, 8))
    with pytest.raises(ModelError, match="cache: is read in the place of table"):
        pared.fit(model, CONF, [torch.randn(16, 8)])


def test_a_forward_that_looks_layers_up_in_a_global_is_refused_without_data(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="forward: uses the global variable LAYERS"):
        pared.fit(LooksUp())
    LAYERS.clear()
    saved = pared.save(pared.fit(build()), tmp_path)
    verbs: tuple[Callable[[], Any], ...] = (
        lambda: pared.load(saved, model=LooksUp()),
        lambda: pared.tune_speed(saved, LooksUp(), [X]),
    )
    for verb in verbs:
        with pytest.raises(ModelError, match="forward: uses the global variable LAYERS"):
            verb()
    LAYERS.clear()


@pytest.mark.parametrize("name", ["compiled", "decorated", "no_grad", "autocast"])
@pytest.mark.parametrize("goal", ["search", "default", "no data"])
def test_a_replaced_forward_is_searched_and_loaded_right(name: str, goal: str, tmp_path: Path) -> None:
    model = wrapped(name)
    with torch.no_grad():
        expected = model(X)

    def score(one: nn.Module) -> float:
        with torch.no_grad():
            return -float((one(X) - expected).square().sum() / expected.square().sum())

    criterion = pared.AccuracyCriterion(criterion="absolute", tolerable_loss=0.01)
    conf = PostTrainingQuantConfig(accuracy_criterion=criterion, approach="weight_only")
    q = pared.fit(model, conf, None if goal == "no data" else [X], score if goal == "search" else None, quiet=True)
    path = pared.save(q, tmp_path)
    for skeleton in (build(), wrapped(name)):
        with torch.no_grad():
            assert torch.equal(pared.load(path, model=skeleton)(X), q(X))
    assert score(q) == pytest.approx(score(pared.load(path, model=build())))
    assert -0.01 <= score(q) < 0
    with torch.no_grad():
        assert torch.equal(model(X), expected)


class Policy(nn.Module):
    """Keeps its hidden state, with its graph."""

    def __init__(self, keep: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.keep = keep
        self.lstm, self.out = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 4)
        self.hidden: Any = None

    def forward(self, x: Tensor) -> Any:
        y, hidden = self.lstm(x[None])
        self.hidden = self.keep(y, hidden)
        return self.out(y[0])


@pytest.mark.parametrize("keep", [lambda y, h: y, lambda y, h: h, lambda y, h: list(h), lambda y, h: {"h": [h[0]]}])
def test_a_model_with_a_kept_graph_is_fitted_and_loaded(keep: Callable[[Any, Any], Any], tmp_path: Path) -> None:
    model = Policy(keep).eval()
    model(X)
    q = pared.fit(model, CONF, [X], quiet=True)
    loaded = pared.load(pared.save(q, tmp_path), model=model)
    with torch.no_grad():
        assert torch.equal(loaded(X), q(X))
        assert torch.allclose(q(X), model(X), atol=0.05)


def test_a_result_that_a_file_does_not_give_is_refused() -> None:
    model = build()
    q = pared.fit(model, CONF, quiet=True)
    check_reloading(q, find_tensors(model), [Call((X,), {})])
    q.register_forward_hook(lambda _module, _args, output: 1.1 * output)
    with pytest.raises(ModelError, match="what would be loaded from its file gives other outputs"):
        check_reloading(q, find_tensors(model), [Call((X,), {})])


def test_a_result_that_a_file_does_not_give_is_refused_before_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise ModelError("gives other outputs", where="Net", remedy="Look.")

    monkeypatch.setattr("pared.fitting.finishing.finish.check_reloading", refuse)
    scored: list[nn.Module] = []

    def score(model: nn.Module) -> float:
        scored.append(model)
        return 1.0

    with pytest.raises(ModelError, match="gives other outputs"):
        pared.fit(build(), None, [X], score, quiet=True)
    assert scored == []


def test_what_is_random_is_compared_with_itself() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return self[0](x + torch.rand(1, generator=GENERATOR))

    model = Noisy(nn.Linear(4, 4)).eval()
    q = pared.fit(model, CONF, quiet=True)
    check_reloading(q, find_tensors(model), [Call((X,), {})])


GENERATOR = torch.Generator()


class Drawing(nn.Module):
    """Draws random numbers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) + 1e-4 * (torch.rand(1) + np.random.rand() + random.random())


def test_random_states_of_the_user_are_kept() -> None:
    model = Drawing().train()
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    pared.fit(model, CONF, [X], quiet=True)
    pared.estimate(model, None, [X])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]
    assert random.getstate() == before[2]
    assert all(module.training for module in model.modules())
