"""Whatever is raised while a model is timed, captured, compared or traced: it is a form that is not chosen."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pared
from pared import AccuracyCriterion, PostTrainingQuantConfig
from pared.fitting import speed
from pared.fitting.search import trade_off
from pared.runtime.record import record_of
from pared.runtime.serving import graph_server
from tests.ratios import snr

pytestmark = [pytest.mark.whole_models_are_timed, pytest.mark.slow]

EIGHT = PostTrainingQuantConfig(quant_level=0)


class Potential(nn.Module):
    """Differentiates within its own forward: forces on atoms."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            positions = positions.detach().requires_grad_(True)
            energy = self.net(positions).sum()
            forces = -torch.autograd.grad(energy, positions)[0]
        return energy.detach(), forces


@pytest.mark.parametrize("approach", ["auto", "static"])
def test_a_model_that_differentiates_in_its_forward(approach: str) -> None:
    torch.manual_seed(0)
    model, x = Potential(), torch.randn(64, 3)
    y = model(x)[1]

    def score(one: nn.Module) -> float:
        return -float((one(x)[1] - y).square().sum() / y.square().sum())

    conf = PostTrainingQuantConfig(
        approach=approach, accuracy_criterion=AccuracyCriterion(criterion="absolute", tolerable_loss=0.01)
    )
    q = pared.fit(model, conf, [x], score)
    assert q.met
    assert score(q) == pytest.approx(q.score, abs=1e-3)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            assert snr(y, q(x)[1]) > 20


def test_gradients_by_inputs_are_those_of_the_decoded_floats() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 1)), torch.randn(16, 8)
    q = pared.fit(model, EIGHT, [x])
    found = []
    for one in (model, q):
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(one(given).sum(), given)
        found.append(gradient)
    assert snr(*found) > 30


class Function(nn.Module):
    def __init__(self, function: Any, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


NO_BATCHES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "an image without a batch": (nn.Sequential(nn.Conv2d(16, 32, 3)), (16, 20, 20)),
    "time first": (Function(lambda s, x: s.c(x.permute(1, 2, 0)), c=nn.Conv1d(32, 64, 5)), (40, 4, 32)),
    "a fixed batch": (Function(lambda s, x: s.c(x, torch.zeros(8, 64)), c=nn.GRUCell(32, 64)), (8, 32)),
    "neighbours": (
        Function(lambda s, x: s.o(x)[torch.cdist(x, x).topk(8).indices].amax(1), o=nn.Linear(3, 64)),
        (100, 3),
    ),
    "a sum over the first dimension": (Function(lambda s, x: s.o(x - x.mean(0)), o=nn.Linear(16, 16)), (6, 16)),
    "a check of the size": (Function(lambda s, x: s.o(x) if len(x) == 6 else 1 / 0, o=nn.Linear(16, 16)), (6, 16)),
}


@pytest.mark.parametrize("name", NO_BATCHES)
def test_a_single_sample_is_timed_only_where_it_is_one(name: str) -> None:
    model, shape = NO_BATCHES[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    q = pared.fit(model.eval(), EIGHT, [x])
    timed = record_of(q).profile.model.calls
    assert [call.arguments[0].shape for call in timed] == [shape]
    assert snr(model(x).detach(), q(x).detach()) > 28


@dataclass
class Found:
    boxes: Tensor
    note: str
    extra: Any = None

    __hash__ = None  # type: ignore[assignment]  # on purpose

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("is never asked")


OUTPUTS: dict[str, Any] = {
    "a dataclass": lambda s, x: Found(s.o(x), "two", {"n": (1, None, True)}),
    "a distribution": lambda s, x: torch.distributions.Normal(s.o(x), s.o(x).exp()),
    "text and arrays": lambda s, x: (s.o(x), "text", np.ones(3), {"a": [None, s.o(x).tanh()]}),
    "an array": lambda s, x: s.o(x).detach().numpy(),
    "nothing but text": lambda s, x: str(float(s.o(x).sum()) > 0),
    "a number": lambda s, x: float(s.o(x).sum()),
    "nested tuples": lambda s, x: ((s.o(x),), [((s.o(x),),)], None),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_any_type(name: str) -> None:
    torch.manual_seed(0)
    model = Function(OUTPUTS[name], o=nn.Linear(32, 32))
    q = pared.fit(model, EIGHT, [torch.randn(8, 32)])
    x = torch.randn(8, 32)
    assert type(q(x)) is type(model(x))
    with torch.no_grad():
        assert snr(model.o(x), q.o(x)) > 28


class InternalError(Exception):
    """Of no family."""


ERRORS = (RuntimeError, AssertionError, KeyError, NotImplementedError, RecursionError, MemoryError, InternalError)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        *(("timed", error) for error in ERRORS),
        *((place, InternalError) for place in ("in_bfloat16", "capture", "differences", "trace")),
    ],
)
def test_an_error_after_the_search_is_a_reason(
    place: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise error("says why\nand more")

    where: Any = {"capture": graph_server, "differences": graph_server, "trace": trade_off}.get(place, speed)
    monkeypatch.setattr(speed, "without_bfloat16", lambda: "")  # it is tried on every machine
    if place == "capture":
        monkeypatch.setattr(speed, "Captures", lambda **_: fail)
    else:
        monkeypatch.setattr(where, place, fail)
    torch.manual_seed(0)
    x = torch.randn(8, 32)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    q = pared.fit(model, PostTrainingQuantConfig(), [x])
    assert snr(model(x).detach(), q(x).detach()) > 25
    if place in ("timed", "in_bfloat16", "capture"):
        assert "says why" in pared.report(q)
        assert "and more" not in pared.report(q)


@pytest.mark.parametrize("form", ["float32", "by_layers"])
def test_a_form_that_raises_is_not_chosen(form: str) -> None:
    class Fussy(nn.Module):
        """Refuses its second call, or quantized weights."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            if form == "by_layers" and "weight" not in self.layer._parameters:
                raise AssertionError("there is no weight")
            out: Tensor = self.layer(x)
            return out

    torch.manual_seed(0)
    model, x = Fussy(), torch.randn(8, 32)
    q = pared.fit(model, PostTrainingQuantConfig(quant_level=0, approach="dynamic"), [x])
    with torch.no_grad():
        assert snr(model(x), q(x)) > 28


def test_an_interrupt_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "timed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pared.fit(nn.Linear(8, 8), EIGHT, [torch.randn(4, 8)])
