"""A graph is captured once: what a call keeps in the model, and what others set in it, is never lost or out of date."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.fitting import speed
from pared.model import calls
from pared.model.calls import Call
from pared.model.tensors import find_tensors
from pared.runtime import float_forms, quantized
from pared.runtime.graphs.call_kinds import arguments_of
from pared.runtime.graphs.capturing.capture import Captures
from pared.runtime.profile.timings import CallTiming, ModelTiming
from pared.runtime.record import contents_of, record_of
from pared.runtime.serving.graph_server import GraphServer
from pared.runtime.serving.served import SERVER, serve
from tests.runtime.test_graphs import bound_of


class Keeping(nn.Module):
    """Keeps something at each call that says so.

    Args:
        keep: gets the module, and its output.
    """

    gain = 1.0

    def __init__(self, keep: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.keep = keep
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.count, self.last, self.table, self.seen = 0, torch.zeros(1), None, {"calls": 0}
        self.register_buffer("mean", torch.zeros(8))
        self.scale = 1.0

    def forward(self, x: Tensor, stateful: bool = False) -> Tensor:
        y: Tensor = self.linear(x) * self.scale * self.gain * (1 + self.count) + self.mean + self.seen["calls"]
        if stateful:
            self.keep(self, y)
        return y


def count(m: Any, _: Tensor) -> None:
    m.count += 1


def last(m: Any, y: Tensor) -> None:
    m.last = y


def total(m: Any, _: Tensor) -> None:
    m.mean = m.mean + 1


def seen(m: Any, _: Tensor) -> None:
    m.seen["calls"] += 1


def statistics(m: Any, y: Tensor) -> None:
    nn.functional.batch_norm(y, m.norm.running_mean, m.norm.running_var, training=True)


def table(m: Any, y: Tensor) -> None:
    if m.table is None:
        m.table = torch.arange(y.shape[-1])


def quantized_model(keep: Callable[[Any, Tensor], object]) -> Any:
    torch.manual_seed(0)
    return pared.fit(Keeping(keep).eval(), PostTrainingQuantConfig(quant_level=0, approach="weight_only"), quiet=True)


def state(m: Any) -> list[object]:
    return [m.count, m.last, m.mean, m.norm.running_var, m.seen["calls"], m.table]


def answers(m: Any, calls: int) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return [m(torch.randn(3, 8), stateful=True) for _ in range(calls)]


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (count, "its forward changes count"),
        (last, "its forward changes last"),
        (total, "its forward changes mean"),
        (seen, "its forward changes seen"),
        (statistics, "its forward changes buffers or inputs"),
        (table, ""),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_calls_that_keep_something_are_for_the_modules(keep: Callable[[Any, Tensor], object], reason: str) -> None:
    expected, q = quantized_model(keep), quantized_model(keep)
    server = GraphServer(float_forms.outline_of, [arguments_of(bound_of(q, {"x": torch.zeros(3, 8)}))])
    serve(q, server)
    torch.testing.assert_close(answers(q, 5), answers(expected, 5))
    torch.testing.assert_close(state(q), state(expected))
    assert server.reason(bound_of(q, {"x": torch.zeros(3, 8), "stateful": True})) == reason


@pytest.mark.parametrize("name", ["scale", "gain", "keep"])
def test_an_attribute_that_is_set_counts_from_then_on(name: str) -> None:
    q = quantized_model(count)
    call = {"x": torch.randn(3, 8)}
    server = GraphServer(float_forms.outline_of, [arguments_of(bound_of(q, call))])
    serve(q, server)
    with torch.no_grad():
        before = [q(**call) for _ in range(3)][-1]
        assert server.reason(bound_of(q, call)) == ""
        setattr(q, name, 1.004)
        torch.testing.assert_close(q(**call), before * (1.0 if name == "keep" else 1.004))
    assert server.reason(bound_of(q, call)) == f"its attribute {name} was changed"


def test_a_copy_in_bfloat16_answers_calls_that_fit_has_seen_with_the_attributes_of_now() -> None:
    q = quantized_model(count)
    timing = CallTiming(arguments_of(bound_of(q, {"x": torch.zeros(3, 8)})), 4.0, 1.0, 4.0, None)
    profile = replace(record_of(q).profile, model=ModelTiming((timing,)))
    fast: Any = quantized.assemble(find_tensors(Keeping(count).eval()), contents_of(q), profile)
    assert SERVER in vars(fast)
    assert not torch.equal(fast(torch.ones(3, 8)), q(torch.ones(3, 8)))
    torch.testing.assert_close(answers(fast, 3), answers(q, 3))
    assert fast.count == q.count == 3
    before = fast(torch.ones(3, 8))
    fast.scale = 3.0
    torch.testing.assert_close(fast(torch.ones(3, 8)), before * 3, rtol=0.02, atol=0.02)


@pytest.mark.whole_models_are_timed
@pytest.mark.slow
@pytest.mark.parametrize(("keep", "is_chosen"), [(last, False), (table, True)], ids=["what it gave", "a table"])
def test_fit_has_no_graph_of_a_call_that_keeps_what_it_gives(
    keep: Callable[[Any, Tensor], object], is_chosen: bool
) -> None:
    model = Keeping(keep).eval()
    made: list[Call] = []
    calls.run(model, [{"x": torch.randn(3, 8), "stateful": True}], 100, listener=lambda call, _: made.append(call))
    (timing, *_) = speed.time_calls(model, model, made, Captures())
    assert (timing.graph_ms is not None) == is_chosen
    assert ("its forward changes last" in timing.because) != is_chosen
