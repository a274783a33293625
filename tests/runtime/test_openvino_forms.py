"""OpenVINO inside a model: the choice among forms, and what answers calls."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared.errors import ModelError
from pared.fitting.timing import forms
from pared.runtime.graphs.call_kinds import arguments_of, bind, parameters_of
from pared.runtime.openvino import graph as openvino_graph
from pared.runtime.openvino.graph import OpenVinoGraph
from pared.runtime.profile import profile
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.profile.timings import CallTiming, ModelTiming
from pared.runtime.quantized import assemble
from pared.runtime.record import contents_of
from tests.runtime.exports import fitted, sqnr
from tests.runtime.in_openvino import MODELS, made

pytestmark = pytest.mark.engine


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
