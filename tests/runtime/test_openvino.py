"""OpenVINO inside a model: the graph of a call with our codes, and the choice among forms."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared.errors import ModelError
from pared.fitting.timing import forms
from pared.runtime.graphs.call_kinds import arguments_of, bind, parameters_of
from pared.runtime.graphs.capturing.capture import capture
from pared.runtime.kernels.activation import NotFiniteError
from pared.runtime.onnx import engines
from pared.runtime.openvino import graph as openvino_graph
from pared.runtime.openvino.graph import OpenVinoGraph
from pared.runtime.profile import profile
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.profile.timings import CallTiming, ModelTiming
from pared.runtime.quantized import assemble
from pared.runtime.record import contents_of
from tests.runtime.exports import CASES, batch_of, fitted, flat, sqnr

pytestmark = pytest.mark.engine


class Padded(nn.Module):
    """What a convolution takes is padded by an operator of its own; the columns are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, stride=2)
        self.side = nn.Conv2d(16, 24, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(nn.functional.pad(x, (1, 1, 1, 1))).relu()
        out: Tensor = self.second(nn.functional.pad(y, (0, 1, 0, 1))) + self.side(y)
        return out


class Outlying(nn.Module):
    """Two columns of the second layer's input are far larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> dict[str, Any]:
        scale = torch.ones(128)
        scale[5], scale[9] = 40.0, 30.0
        return {"out": self.second(torch.tanh(self.first(x)) * scale), "kind": "outlying", "same": x}


class Widened(Outlying):
    """The same between two products, so that the first can compute the columns again."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.first.weight[5] *= 40
            self.first.weight[9] *= 30

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"out": self.second(nn.functional.gelu(self.first(x))), "kind": "widened", "same": x}


class Shifted(Widened):
    """The same without a bias; a number is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first.register_parameter("bias", None)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"out": self.second(nn.functional.gelu(self.first(x) + 0.5)), "kind": "shifted", "same": x}


MODELS = CASES | {
    "widened": (Widened, (6, 64)),
    "shifted": (Shifted, (6, 64)),
    "padded": (Padded, (2, 3, 12, 12)),
    "outliers": (Outlying, (6, 64)),
}
RUNS = [
    (name, approach)
    for name in sorted(MODELS.keys() - {"lstm", "gru"})
    for approach in ("static", "dynamic", "weight_only")
    if name != "encoder" or approach != "static"
]


def made(q: nn.Module, model: nn.Module, *args: Tensor) -> tuple[OpenVinoGraph, tuple[str, ...]]:
    names = parameters_of(model)
    bound = bind(names, args, {})
    assert bound is not None
    return OpenVinoGraph(q, capture(copy.deepcopy(model), arguments_of(bound))), names


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


def test_recurrent_layers_are_left_to_our_kernels() -> None:
    make, shape = MODELS["lstm"]
    model, x = make().eval(), batch_of("lstm", shape)
    with pytest.raises(ModelError, match="OpenVINO cannot run it"):
        made(fitted(model, "dynamic", [x]), model, x)


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


def call_timing(modules: float, graph: float | None, openvino: float | None) -> CallTiming:
    x = torch.zeros(2, 8)
    bound = bind(["x"], (x,), {})
    assert bound is not None
    return CallTiming(arguments_of(bound), 10.0, None, modules, graph, "", openvino)


@pytest.mark.parametrize(
    ("times", "graphs", "openvino"),
    [
        ([(9.0, 5.0, 3.0)], 0, 1),
        ([(9.0, 5.0, 4.9)], 1, 0),  # hardly faster than ours
        ([(9.0, None, 3.0)], 0, 1),
        ([(2.0, 5.0, 3.0)], 0, 0),
        ([(9.0, 5.0, 3.0), (9.0, 5.0, None)], 1, 0),  # not for every size
        ([(9.0, 9.0, 3.0), (2.0, 2.0, 2.1)], 0, 1),  # on average
    ],
)
def test_the_fastest_form_is_chosen_for_each_kind_of_call(
    times: list[tuple[float, float | None, float | None]], graphs: int, openvino: int
) -> None:
    timing = ModelTiming(tuple(call_timing(*one) for one in times))
    forms = [one.form for one in timing.served]
    assert (forms.count("graph"), forms.count("openvino")) == (graphs, openvino)
    if openvino:
        assert timing.forms
        assert "in OpenVINO" in timing.summary()[0]
    assert Profile.from_json(Profile(this_machine(), model=timing).to_json()).model == timing


def served(model: nn.Module, x: Tensor) -> nn.Module:
    """A model quantized at 8 bits whose calls OpenVINO answers, as if it had been fastest."""
    q = fitted(model, "static", [x])
    bound = bind(parameters_of(model), (x,), {})
    assert bound is not None
    timing = ModelTiming((CallTiming(arguments_of(bound), 10.0, None, 9.0, 8.0, "", 1.0),))
    tensors = pared.model.tensors.find_tensors(pared.runtime.float_forms.skeleton_of(q))
    return assemble(tensors, contents_of(q), Profile(this_machine(), model=timing))


def answered(q: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, int]:
    calls: list[object] = []
    own = OpenVinoGraph.__call__

    def counted(self: OpenVinoGraph, bound: Any) -> Any:
        calls.append(bound)
        return own(self, bound)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(OpenVinoGraph, "__call__", counted)
        return q(x), len(calls)


def test_a_model_is_answered_by_it_and_so_are_its_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = MODELS["linear"]
    model, x = make().eval(), torch.randn(shape)
    q = served(model, x)
    wanted, calls = answered(q, x, monkeypatch)
    assert calls == 1
    assert isinstance(q, nn.Sequential)
    pared.save(q, tmp_path)
    copies = {
        "deepcopy": copy.deepcopy(q),
        "pickle": pickle.loads(pickle.dumps(q)),
        "load": pared.load(tmp_path, model=make()),
    }
    for name, other in copies.items():
        found, calls = answered(other, x, monkeypatch)
        assert (torch.equal(found, wanted), calls) == (True, 1), name


def test_calls_that_it_does_not_take_are_answered_by_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, shape = MODELS["linear"]
    model, x = make().eval(), torch.randn(shape)
    q = served(model, x)
    answered(q, x, monkeypatch)
    spoiled = x.clone()
    spoiled[0, 0, 0] = torch.inf
    found, _ = answered(q, spoiled, monkeypatch)
    assert found[0, 0].isnan().any() or found[0, 0].isinf().any()
    assert found[1:].isfinite().all()
    other, calls = answered(q, x[0], monkeypatch)  # of another rank
    assert (other.shape, calls) == ((5, 8), 0)


def test_a_version_that_is_too_old_costs_only_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2024.6.0-17404")
    model, x = nn.Linear(8, 4).eval(), torch.randn(3, 8)
    with pytest.raises(ModelError, match=r"version 2024.6.0-17404 is installed, and 2025.0 is the oldest"):
        made(fitted(model, "static", [x]), model, x)


def test_a_runtime_that_fails_costs_only_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, shape = MODELS["linear"]
    model, x = make().eval(), torch.randn(shape)
    q = served(model, x)
    monkeypatch.setattr(openvino_graph, "converted", lambda *_: 1 / 0)
    with torch.no_grad():
        assert sqnr(q(x).numpy(), model(x).numpy()) > 30


@pytest.mark.whole_models_are_timed
@pytest.mark.parametrize("trouble", ["nothing", "not installed", "far", "fails"])
def test_fit_times_it_beside_the_others(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if trouble == "not installed":
        monkeypatch.setattr(openvino_graph, "find_spec", lambda _: None)
        monkeypatch.setattr(profile, "_version", lambda _: "")
    elif trouble == "far":
        monkeypatch.setattr(forms, "_AS_FAR", -1.0)
    elif trouble == "fails":
        monkeypatch.setattr(openvino_graph, "converted", lambda *_: 1 / 0)
    torch.manual_seed(0)
    make, shape = MODELS["linear"]
    q: Any = pared.fit(make().eval(), calib_dataloader=[torch.randn(shape)], quiet=True)
    calls = pared.runtime.record.record_of(q).profile.model.calls
    assert calls
    hint = "OpenVINO was not tried, as it is not installed: pip install 'pared[fast]'"
    assert (hint in q.report()) == (trouble == "not installed")
    because = {
        "not installed": "",
        "far": "no openvino: it is further from float32 than the modules are",
        "fails": "no openvino: OpenVINO cannot run it: ZeroDivisionError",
    }
    for call in calls:
        if trouble == "nothing":
            assert call.openvino_ms is not None
            assert call.openvino_ms > 0
        else:
            assert call.openvino_ms is None
            assert because[trouble] in call.because


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
