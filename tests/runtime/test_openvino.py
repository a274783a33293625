"""OpenVINO inside a model: the graph of a call with our codes."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared.errors import ModelError
from pared.runtime.graphs.call_kinds import arguments_of, bind, parameters_of
from pared.runtime.graphs.capturing.capture import capture
from pared.runtime.kernels.activation import NotFiniteError
from pared.runtime.onnx import engines
from pared.runtime.openvino import graph as openvino_graph
from pared.runtime.openvino.graph import OpenVinoGraph
from pared.runtime.record import contents_of
from tests.runtime.exports import batch_of, fitted, flat, sqnr
from tests.runtime.in_openvino import MODELS, made

pytestmark = pytest.mark.engine


RUNS = [
    (name, approach)
    for name in sorted(MODELS)
    for approach in ("static", "dynamic", "weight_only")
    if name != "encoder" or approach != "static"
]


@pytest.mark.parametrize(("name", "approach"), RUNS)
def test_a_graph_gives_what_the_model_gives(name: str, approach: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make().eval(), batch_of(name, shape)
    q = fitted(model, approach, [x, batch_of(name, shape, 1)])
    graph, names = made(q, model, x)
    for rows in (shape[0], 3):
        given = x[:rows]
        bound = bind(names, (given,), {})
        assert bound is not None
        assert graph.fits(bound)
        with torch.inference_mode():
            found, wanted = graph(bound), q(given)
        assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(wanted)
        # Codes are rounded elsewhere: single codes differ, and dynamic inputs stay floats.
        assert min(map(sqnr, flat(found), flat(wanted))) > 28


@pytest.mark.parametrize("name", ["linear", "outliers", "widened"])
def test_static_layers_are_a_product_of_codes_each(name: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    q = fitted(model, "static", [x])
    assert any(one.outliers for one in contents_of(q).activations.values())
    graph, _ = made(q, model, x)
    kinds = [(kind, given) for kind, given, _ in _operators(graph) if kind == "FullyConnected"]
    assert kinds == [("FullyConnected", "u8")] * 2
    if name == "widened":  # the activation and the rounding are part of the first product
        assert [kind for kind, *_ in _operators(graph) if kind in ("Concatenation", "Eltwise", "Gather")] == []
        assert [gives for kind, _, gives in _operators(graph) if kind == "FullyConnected"] == ["u8", "f32"]


def _operators(graph: OpenVinoGraph) -> list[tuple[str, str, str]]:
    """The operators that run: type, precision, and the type of what they give."""
    names = "layerType", "runtimePrecision", "outputPrecisions"
    ops = graph._sessions.here()._compiled.get_runtime_model().get_ordered_ops()
    infos = [[op.get_rt_info()[name].value for name in names] for op in ops]
    return [(kind, "u8" if given in ("u8", "i8") else given, gives) for kind, given, gives in infos]


def test_outputs_belong_to_the_caller() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 4).eval(), torch.randn(3, 8)
    graph, names = made(fitted(model, "static", [x]), model, x)
    first = graph(bind(names, (x,), {}) or {})
    kept = first.clone()
    graph(bind(names, (-x,), {}) or {})
    assert torch.equal(first, kept)


def test_several_threads_may_call_it() -> None:
    torch.manual_seed(0)
    make, shape = MODELS["linear"]
    model, x = make().eval(), torch.randn(shape)
    graph, names = made(fitted(model, "static", [x]), model, x)
    inputs = [torch.randn(shape) for _ in range(32)]
    wanted = [graph(bind(names, (one,), {}) or {}) for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: graph(bind(names, (one,), {}) or {}), inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_numbers_that_are_not_finite_are_left_to_the_modules() -> None:
    model, x = nn.Linear(8, 4).eval(), torch.randn(3, 8)
    graph, names = made(fitted(model, "static", [x]), model, x)
    x[1, 2] = torch.nan
    with pytest.raises(NotFiniteError):
        graph(bind(names, (x,), {}) or {})


def test_another_number_of_threads_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(8, 4).eval(), torch.randn(3, 8)
    graph, names = made(fitted(model, "static", [x]), model, x)
    bound = bind(names, (x,), {}) or {}
    expected = graph(bound)
    asked: list[int] = []
    session = engines.OpenVinoSession

    def counted(graph: Any, threads: int) -> Any:
        asked.append(threads)
        return session(graph, threads)

    monkeypatch.setattr(openvino_graph, "OpenVinoSession", counted)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        for _ in range(2):
            torch.testing.assert_close(graph(bound), expected)
    finally:
        torch.set_num_threads(before)
    graph(bound)
    assert asked == [before + 1]


class Borrowed(nn.Module):
    """A weight that is also read outside of its layer, for far larger inputs; a layer of two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.again = self.first
        self.last = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(self.first(x).relu())
        out: Tensor = self.last(y) + 1e-2 * nn.functional.linear(100 * y, self.last.weight)
        return out


def test_only_the_inputs_of_layers_are_on_their_grids() -> None:
    torch.manual_seed(0)
    model, x = Borrowed().eval(), torch.randn(16, 64)
    q = fitted(model, "static", [x])
    graph, names = made(q, model, x)
    with torch.no_grad():
        assert sqnr(graph(bind(names, (x,), {}) or {}).numpy(), q(x).numpy()) > 33


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize("approach", ["static", "dynamic", "weight_only"])
def test_a_submodel_runs_on_its_codes(approach: str) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 64))
            self.last = nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.inner(x))
            return out

    torch.manual_seed(0)
    model, x = Whole().eval(), torch.randn(16, 64)
    q: Any = fitted(model, approach, [x])
    graph, names = made(q.inner, model.inner, x)
    with torch.no_grad():
        assert sqnr(graph(bind(names, (x,), {}) or {}).numpy(), q.inner(x).numpy()) > 33
    given = [one for kind, one, _ in _operators(graph) if kind == "FullyConnected"]
    assert given == ["u8"] * 2 or approach != "static"


def test_rows_of_a_table_are_read_as_codes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(500, 64), nn.Linear(64, 500, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.table(ids).tanh())
            return out

    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.randint(0, 500, (4, 7))
    q = fitted(model, "static", [ids])
    graph, names = made(q, model, ids)
    with torch.no_grad():
        assert sqnr(graph(bind(names, (ids,), {}) or {}).numpy(), q(ids).numpy()) > 33
    kinds = [(kind, given) for kind, given, _ in _operators(graph) if kind in ("Gather", "FullyConnected")]
    assert ("Gather", "u8") in kinds
    assert ("FullyConnected", "u8") in kinds
    ops = graph._sessions.here()._compiled.get_runtime_model().get_ordered_ops()
    sizes = [op.get_output_shape(0) for op in ops if op.get_rt_info()["layerType"].value == "Const"]
    assert sum(tuple(size) == (500, 64) for size in sizes) <= 2, "one table of codes for rows, one for the product"


def test_an_operator_that_nobody_knows_is_named() -> None:
    model, x = Unknown().eval(), torch.randn(3, 8)
    with pytest.raises(ModelError, match="OpenVINO does not know .*bessel_j0"):
        made(fitted(nn.Sequential(nn.Linear(8, 8)), "static", [x]), model, x)


def test_the_same_numbers_are_converted_once() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)).eval(), torch.randn(16, 32)
    q = pared.fit(model, calib_dataloader=[x], quiet=True)
    bound = bind(parameters_of(q), (x,), {})
    assert bound is not None
    captured = capture(copy.deepcopy(model), arguments_of(bound))
    first, again = (OpenVinoGraph(one, captured) for one in (q, copy.deepcopy(q)))
    assert first._sessions is again._sessions
    changed = pared.fit(model, calib_dataloader=[3 * x], quiet=True)
    assert OpenVinoGraph(changed, captured)._sessions is not first._sessions
    with torch.no_grad():
        assert torch.equal(first(bound), again(bound))
