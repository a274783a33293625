"""Which calls of a quantized model a graph answers, and that nothing else changes by it."""

import copy
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared.model.tensors import find_tensors
from pared.runtime import float_forms, quantized
from pared.runtime.graphs.call_kinds import arguments_of, bind
from pared.runtime.graphs.graph import Graph
from pared.runtime.profile.timings import CallTiming, ModelTiming
from pared.runtime.record import contents_of, record_of
from pared.runtime.serving.float_copy import FloatServer
from pared.runtime.serving.graph_server import GraphServer
from pared.runtime.serving.served import SERVER, forward_of, serve
from tests.runtime.generators import near
from tests.runtime.test_graphs import CASES, assembled, bound_of, leaves

# A graph for any size may compute attention otherwise than one for a known size: the last bits are the processor's.
ROUNDING = 1e-9


def served(q: nn.Module, call: dict[str, Any]) -> GraphServer:
    """The model with a graph for a call kind."""
    server = GraphServer(float_forms.outline_of, [arguments_of(bound_of(q, call))])
    serve(q, server)
    return server


@pytest.fixture(name="pair")
def _pair(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, list[str]]:
    """A model whose calls have a graph, and a list that says which calls the graph answered."""
    case = CASES["attention"]
    _, q = assembled(case)
    served(q, case.call(4, 24))
    answered: list[str] = []
    plain = Graph.__call__

    def noted(self: Graph, bound: dict[str, Any]) -> Any:
        answered.append("graph")
        return plain(self, bound)

    monkeypatch.setattr(Graph, "__call__", noted)
    with torch.no_grad():
        q(**CASES["attention"].call(4, 24))  # the first call compares
    answered.clear()
    return q, answered


IDS = CASES["attention"].call(2, 9)["ids"]


@pytest.mark.slow
def test_a_graph_serves_its_way_of_calling_whatever_the_sizes(pair: tuple[nn.Module, list[str]]) -> None:
    q, answered = pair
    with torch.no_grad():
        q(IDS)
        q(ids=IDS)
        q(ids=IDS[:, :5])
    assert answered == ["graph"] * 3


@pytest.mark.slow
def test_other_constants_have_graphs_of_their_own(pair: tuple[nn.Module, list[str]]) -> None:
    q, answered = pair
    calls: list[dict[str, Any]] = [{}, {"mask": None}, {"scale": 2.0}, {"scale": 2.0}, {}]
    with torch.no_grad():
        for call in calls:
            found, expected = q(IDS, **call)["hidden"], forward_of(q)(q, IDS, **call)["hidden"]
            assert near(found, expected, ROUNDING)
        assert answered == ["graph"] * 5
        q(IDS, scale=3.0)
    assert answered == ["graph"] * 5, "two others are enough: each costs seconds"


@pytest.mark.parametrize(
    "call",
    [
        lambda q: q(IDS.int()),
        lambda q: q(IDS, torch.zeros(9, 9)),
        lambda q: q.train()(IDS),
        lambda q: q.last.register_forward_hook(lambda *_: None) and q(IDS),
        lambda q: q._modules.update(last=nn.Identity()) or q(IDS),
        lambda q: q(IDS.as_subclass(Marked)),
    ],
    ids=["type", "mask", "training", "hook", "exchanged", "subclass"],
)
@pytest.mark.slow
def test_all_other_calls_are_for_the_modules(pair: tuple[nn.Module, list[str]], call: Callable[[Any], Any]) -> None:
    q, answered = pair
    with torch.no_grad():
        call(q)
    assert answered == []


class Marked(Tensor):
    """A tensor of a class of its own."""


@pytest.mark.parametrize("place", ["inside", "itself"])
@pytest.mark.slow
def test_hooks_are_called_once_a_call_and_with_numbers(place: str) -> None:
    case = CASES["attention"]
    _, q = assembled(case)
    server = served(q, case.call(4, 24))
    listened = q.last if place == "inside" else q
    seen: list[str] = []

    def after(_module: nn.Module, _args: Any, out: Any) -> None:
        assert all(one.isfinite().all().item() for one in leaves(out))  # what has no numbers would raise
        seen.append("after")

    listened.register_forward_pre_hook(lambda *_: seen.append("before"))
    listened.register_forward_hook(after)
    with torch.no_grad():
        for _ in range(2):
            q(**case.call(4, 24))
    assert seen == ["before", "after"] * 2
    reason = server.reason(bound_of(q, case.call(4, 24)))
    assert reason == ("a module inside has hooks" if place == "inside" else "")


@pytest.mark.slow
def test_autocast_and_gradients_are_for_the_modules(pair: tuple[nn.Module, list[str]]) -> None:
    q, answered = pair
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        q(IDS)
    q.last.weight.requires_grad_(True)
    q(IDS)["hidden"].sum().backward()
    assert q.last.weight.grad is not None
    assert answered == []


@pytest.mark.slow
def test_a_changed_weight_is_seen(pair: tuple[nn.Module, list[str]]) -> None:
    q, _ = pair
    with torch.no_grad():
        q.last.bias.add_(1.0)
        after = q(IDS)["hidden"]
        q.load_state_dict(q.state_dict() | {"wide.bias": torch.zeros(256)}, strict=True)
        later = q(IDS)["hidden"]
        serve(q, GraphServer(float_forms.outline_of))
        assert near(q(IDS)["hidden"], later, ROUNDING)
    assert not torch.equal(after, later)


@pytest.mark.slow
def test_a_graph_that_differs_from_the_modules_is_dropped(pair: tuple[nn.Module, list[str]], monkeypatch: Any) -> None:
    q, _ = pair
    monkeypatch.setattr(Graph, "__call__", lambda self, bound: {"hidden": torch.zeros(1), "pooled": torch.zeros(1)})
    server = served(q, {"ids": IDS})
    with torch.no_grad():
        expected = forward_of(q)(q, IDS)
        for _ in range(2):
            assert torch.equal(q(IDS)["hidden"], expected["hidden"])
    assert server.reason(bound_of(q, {"ids": IDS})) == "the graph does not give what the modules give"


@pytest.mark.slow
def test_copies_and_pickles_make_graphs_of_their_own(pair: tuple[nn.Module, list[str]]) -> None:
    q, answered = pair
    twin = copy.deepcopy(q)
    with torch.no_grad():
        assert torch.equal(twin(IDS)["hidden"], q(IDS)["hidden"])
        twin(IDS)
        twin.last.bias.add_(1.0)
        assert not torch.equal(twin(IDS)["hidden"], q(IDS)["hidden"])
    assert answered.count("graph") > 2


@pytest.mark.slow
def test_eight_threads_share_a_graph(pair: tuple[nn.Module, list[str]]) -> None:
    q, _ = pair
    served(q, {"ids": IDS})
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.extend(q(IDS)["hidden"] for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 160
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.slow
def test_a_profile_with_graphs_makes_them_after_loading(tmp_path: Any) -> None:
    case = CASES["attention"]
    model, q = assembled(case)
    arguments = arguments_of(bound_of(q, case.call(4, 24)))
    timing = CallTiming(arguments, 4.0, None, 2.0, 1.0, "no bfloat16: it is too far from float32")
    profile = replace(record_of(q).profile, model=ModelTiming((timing,)))
    fast = quantized.assemble(find_tensors(model), contents_of(q), profile)
    loaded = pared.load(pared.save(fast, tmp_path), model=case.model())
    assert vars(loaded)[SERVER].wanted == (arguments,)
    assert "runs as a graph, each layer in its own kernel" in pared.report(loaded)
    with torch.no_grad():
        for _ in range(2):
            assert near(loaded(**case.call(2, 9))["hidden"], q(**case.call(2, 9))["hidden"], ROUNDING)
    server = vars(loaded)[SERVER]
    assert isinstance(server, GraphServer)
    assert server.reason(bound_of(q, case.call(2, 9))) == ""


@pytest.mark.parametrize(
    "damage",
    [
        {"arguments": [{"name": "ids", "dtype": "load", "shape": [1]}]},
        {"arguments": [{"name": "ids", "dtype": "int64", "shape": [-1]}]},
        {"arguments": [{"name": "ids", "dtype": "int64", "shape": ["1"]}]},
        {"float32_ms": 0},
        {"graph_ms": float("nan")},
        {"modules_ms": "1"},
    ],
    ids=repr,
)
def test_a_damaged_measurement_is_told_and_not_used(damage: Any, tmp_path: Path, caplog: Any) -> None:
    case = CASES["attention"]
    _, q = assembled(case)
    path = pared.save(q, tmp_path)
    engine = json.loads((tmp_path / "engine.json").read_text(encoding="utf-8"))
    good = {"arguments": [], "float32_ms": 2.0, "bfloat16_ms": None, "modules_ms": 1.0, "graph_ms": None}
    (tmp_path / "engine.json").write_text(json.dumps(engine | {"calls": {"": [good | damage]}}), encoding="utf-8")
    loaded = pared.load(path, model=case.model())
    assert "engine.json cannot be read" in caplog.text
    with torch.no_grad():
        assert torch.equal(loaded(IDS)["hidden"], q(IDS)["hidden"])


@pytest.mark.slow
def test_a_shape_that_fits_no_memory_leaves_the_modules(pair: tuple[nn.Module, list[str]]) -> None:
    q, answered = pair
    (small,) = arguments_of(bound_of(q, {"ids": IDS}))
    serve(q, GraphServer(float_forms.outline_of, [[replace(small, shape=(10**9, 10**9))]]))
    with torch.no_grad():
        assert torch.equal(q(IDS)["hidden"], forward_of(q)(q, IDS)["hidden"])
    assert answered == []


@pytest.mark.slow
def test_an_argument_that_is_given_twice_is_an_error_of_python(pair: tuple[nn.Module, list[str]]) -> None:
    q, _ = pair
    assert bind(("ids",), (IDS,), {"ids": IDS}) is None
    with pytest.raises(TypeError, match="multiple values"):
        q(IDS, ids=IDS)


@pytest.mark.slow
def test_a_copy_in_bfloat16_steps_back_for_hooks_and_follows_changes(pair: tuple[nn.Module, list[str]]) -> None:
    case = CASES["attention"]
    model, q = assembled(case)
    timing = CallTiming(arguments_of(bound_of(q, {"ids": IDS})), 4.0, 1.0, 4.0, None)
    profile = replace(record_of(q).profile, model=ModelTiming((timing,)))
    q = quantized.assemble(find_tensors(model), contents_of(q), profile)
    assert isinstance(vars(q)[SERVER], FloatServer)
    with torch.no_grad():
        before = q(IDS)["hidden"]
        assert not torch.equal(before, forward_of(q)(q, IDS)["hidden"])
        q.last.bias.add_(1.0)
        assert torch.allclose(q(IDS)["hidden"], before + 1, atol=0.05)
        seen: list[Any] = []
        q.last.register_forward_hook(lambda *_: seen.append(None))
        assert torch.equal(q(IDS)["hidden"], forward_of(q)(q, IDS)["hidden"])
    assert seen
