"""What runs is what was measured to be fastest: on tuned models, by hand-made measurements, and for real."""

import copy
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import minilm
from torch import Tensor, nn
from typer.testing import CliRunner

import pared
from pared import ConfigError, PostTrainingQuantConfig
from pared.fitting import speed
from pared.model.calls import Call
from pared.model.recorded import values
from pared.model.tensors import find_tensors
from pared.runtime import float_forms, quantized
from pared.runtime.graphs.call_kinds import Argument
from pared.runtime.graphs.capturing.capture import Captures
from pared.runtime.openvino.graph import is_installed
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.profile.timings import CallTiming, ModelTiming, Timing
from pared.runtime.record import Result, contents_of, record_of
from pared.runtime.serving.float_copy import FloatServer
from pared.runtime.serving.graph_server import GraphServer
from pared.runtime.serving.served import SERVER, forward_of, serve

STATIC = PostTrainingQuantConfig(approach="static", quant_level=0)
CALL = (Argument("input", "float32", (64, 64)),)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


def batches() -> list[Tensor]:
    return [torch.randn(64, 64, generator=torch.Generator().manual_seed(0))]


def timed(float32: float, bfloat16: float | None, modules: float, graph: float | None) -> Profile:
    return Profile(this_machine(), model=ModelTiming((CallTiming(CALL, float32, bfloat16, modules, graph),)))


@pytest.mark.parametrize(
    ("times", "whole", "served"),
    [
        ((4.0, 3.0, 2.0, 1.0), "int8", 1),
        ((4.0, 3.0, 2.0, 1.9), "int8", 0),  # a graph has to be faster by a tenth
        ((4.0, None, 3.9, None), "float32", 0),  # and so has int8
        ((4.0, None, 3.9, 3.0), "int8", 1),
        ((4.0, 2.0, 3.0, None), "bfloat16", 1),
        ((4.0, 3.8, 5.0, 4.5), "float32", 0),
    ],
)
def test_what_replaces_the_default_is_faster_by_a_tenth(times: Any, whole: str, served: int) -> None:
    profile = timed(*times)
    assert profile.model.kernel == whole
    assert len(profile.model.served) == served
    assert Profile.from_json(profile.to_json()) == profile


def graphs(*calls: CallTiming) -> list[tuple[tuple[Argument, ...], float, float]]:
    """What graphs answer: the example, and the sizes."""
    found = ModelTiming(calls).served
    assert {one.form for one in found} <= {"graph"}
    return [(one.example, one.least, one.below) for one in found]


def test_a_graph_must_pay_over_all_calls_of_a_size() -> None:
    every = [(CALL, 0.0, math.inf)]
    one, two = CallTiming(CALL, 9.0, None, 4.0, 2.0), CallTiming(CALL, 2.0, None, 1.0, 3.0)
    assert graphs(one) == every
    assert graphs(one, two) == []
    assert graphs(one, replace(two, graph_ms=0.9)) == every
    little = CallTiming(CALL, 9.0, None, 4.0, 3.9)
    assert graphs(little, replace(two, graph_ms=0.9)) == every, "a tenth in one, slower in none"
    assert graphs(little, replace(two, graph_ms=0.95)) == []
    assert graphs(replace(little, graph_ms=4.1), replace(two, graph_ms=0.89)) == []
    other = replace(two, arguments=(Argument("input", "int64", (2,)),))
    assert graphs(one, other) == every, "other call kinds are judged by themselves"


def test_calls_of_each_size_run_in_the_form_that_is_fastest_for_them() -> None:
    single = (Argument("input", "float32", (1, 64)),)
    large, small = CallTiming(CALL, 9.0, None, 4.0, 2.0), CallTiming(single, 2.0, None, 1.0, 3.0)
    assert graphs(large, small) == [(CALL, 8 * 64.0, math.inf)], "from the geometric mean of both sizes on"
    assert graphs(replace(large, graph_ms=5.0), replace(small, graph_ms=0.5)) == [(CALL, 0.0, 8 * 64.0)]
    timing = ModelTiming((replace(large, openvino_ms=2.1), replace(small, graph_ms=0.6, openvino_ms=0.5)))
    found = [(one.form, one.least, one.below) for one in timing.served]
    assert found == [("openvino", 0.0, 512.0), ("graph", 512.0, math.inf)]
    assert timing.forms == ("openvino", "graph")
    assert timing.share == pytest.approx(math.sqrt(2 / 9 * 0.5 / 2))
    near = ModelTiming((replace(large, openvino_ms=2.1), replace(small, graph_ms=0.54, openvino_ms=0.5)))
    assert len(near.served) == 1, "less than a tenth is not worth a second graph"


def test_a_model_runs_each_size_in_its_form() -> None:
    model = network()
    q: Any = pared.fit(model, STATIC, batches(), quiet=True)
    single = (Argument("input", "float32", (1, 64)),)
    calls = (CallTiming(CALL, 9.0, None, 4.0, 2.0), CallTiming(single, 2.0, None, 1.0, 3.0))
    profile = Profile(this_machine(), model=ModelTiming(calls))
    q = quantized.assemble(find_tensors(float_forms.skeleton_of(q)), contents_of(q), profile)
    x = batches()[0]
    with torch.no_grad():
        for one in (q, copy.deepcopy(q)):
            answers = [
                one.__dict__[SERVER].serve(one, (x[:rows],), {}, forward_of(one)) is not NotImplemented
                for rows in (1, 7, 8, 64)
            ]
            assert answers == [False, False, True, True]


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_a_size_at_which_no_int8_pays_runs_in_floats(form: str) -> None:
    single = (Argument("input", "float32", (1, 64)),)
    half = 1.0 if form == "bfloat16" else None
    calls = (CallTiming(CALL, 9.0, None, 4.0, 2.0), CallTiming(single, 2.0, half, 2.5, 3.0))
    assert [one.form for one in ModelTiming((calls[0], replace(calls[1], modules_ms=2.1))).served] == (
        ["bfloat16", "graph"] if half else ["graph"]
    ), "floats that are less than a tenth faster are not worth their memory"
    cached = [replace(call, arguments=(*call.arguments, Argument("c", holds="DynamicCache(1)"))) for call in calls]
    assert ModelTiming(tuple(cached)).forms == ("graph",), "no copy takes a cache"
    model = network()
    contents = contents_of(pared.fit(model, STATIC, batches(), quiet=True))
    profile = Profile(this_machine(), model=ModelTiming(calls))
    assert Profile.from_json(profile.to_json()) == profile
    q = quantized.assemble(find_tensors(model), contents, profile)
    assert f"in {form}, for sizes at which that is faster" in pared.report(q)
    exact = float_forms.decoded(find_tensors(model), contents)
    x = batches()[0]
    with torch.no_grad():
        for one in (q, copy.deepcopy(q)):
            found, decoded = one(x[:1]), exact(x[:1])
            assert torch.equal(found, decoded) == (form == "float32")
            assert (found - decoded).square().sum() < 1e-3 * decoded.square().sum()
            assert not torch.equal(one(x), exact(x)), "larger calls run in int8"
            assert not torch.equal(forward_of(one)(one, x[:1]), found), "so do the modules"


def test_int8_that_does_not_pay_leaves_floats_and_the_same_file(tmp_path: Path) -> None:
    q = pared.fit(network(), STATIC, batches(), quiet=True)
    contents = contents_of(q)
    slow = quantized.assemble(find_tensors(network()), contents, timed(1.0, None, 2.0, 3.0))
    assert {line.kernel for line in slow.plan} == {"float"}
    assert "runs in float32: nothing else was at least a tenth faster" in pared.report(slow)
    one, other = pared.save(q, tmp_path / "a"), pared.save(slow, tmp_path / "b")
    assert one.read_bytes() == other.read_bytes()


def test_bfloat16_answers_where_it_is_fastest() -> None:
    model = network()
    contents = contents_of(pared.fit(model, STATIC, batches(), quiet=True))
    half = quantized.assemble(find_tensors(model), contents, timed(3.0, 1.0, 2.0, 2.0))
    assert isinstance(vars(half)[SERVER], FloatServer)
    x = batches()[0]
    with torch.no_grad():
        found, floats = half(x), forward_of(half)(half, x)
        assert found.dtype == torch.float32
        assert 0 < (found - floats).square().sum() < 1e-3 * floats.square().sum()
        assert torch.equal(half.train()(x), floats), "elsewhere its modules run"
    assert "runs in bfloat16" in pared.report(half)


def test_beside_bfloat16_other_forms_answer_sizes_at_which_they_are_faster() -> None:
    single = (Argument("input", "float32", (1, 64)),)
    calls = (CallTiming(CALL, 9.0, 3.0, 4.0, None, "", 8.0), CallTiming(single, 2.0, 1.9, 2.5, None, "", 1.6))
    timing = ModelTiming(calls)
    assert timing.kernel == "bfloat16"
    small, large = timing.served
    assert (small.form, small.least, large.form, large.below) == ("openvino", 0.0, "bfloat16", math.inf)
    assert small.below == large.least
    assert "in bfloat16, for sizes at which that is faster or in OpenVINO, faster than int8" in timing.summary()[0]
    near = ModelTiming((calls[0], replace(calls[1], openvino_ms=1.8)))
    assert [one.form for one in near.served] == ["bfloat16"], "less than a tenth is not worth a second form"
    assert "runs in bfloat16, faster than int8" in near.summary()[0]


def test_all_layers_run_in_int8_where_that_is_faster_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    slow_alone = Timing((64, 64), 1.0, 2.0, 1.5)
    monkeypatch.setattr(
        speed, "time_layers", lambda *_, **__: Profile(this_machine(), {"0": slow_alone, "2": slow_alone})
    )

    def time_calls(_: nn.Module, by_layers: nn.Module, *_rest: Any, **_options: Any) -> tuple[CallTiming, ...]:
        kernels = [line.kernel for line in Result(by_layers).plan if line.name in ("0.weight", "2.weight")]
        return (CallTiming(CALL, 4.0, None, 3.0, 1.0 if kernels == ["int8 static"] * 2 else 2.0),)

    monkeypatch.setattr(speed, "time_calls", time_calls)
    q = pared.fit(model, STATIC, batches(), quiet=True)
    assert record_of(q).profile.together
    assert [line.kernel for line in q.plan if line.name == "0.weight"] == ["int8 static"]


@pytest.mark.whole_models_are_timed
def test_a_call_that_is_no_way_of_calling_has_no_copy_in_bfloat16() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, 64)

        def forward(self, both: list[torch.Tensor]) -> torch.Tensor:
            out: torch.Tensor = self.last(both[0] + both[1])
            return out

    model = Listed().eval()
    (timing,) = speed.time_calls(model, model, [Call(([torch.zeros(2, 64), torch.zeros(2, 64)],), {})], Captures())
    assert timing.bfloat16_ms is None
    assert timing.graph_ms is None
    assert timing.because.count("an argument is neither a tensor nor a constant") == 2 + is_installed()


def test_layers_are_not_timed_where_another_runtime_answers_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Profile:
        raise AssertionError

    elsewhere = CallTiming(CALL, 4.0, None, 2.0, 1.5, openvino_ms=1.0)
    monkeypatch.setattr(speed, "time_layers", refused)
    monkeypatch.setattr(speed, "time_calls", lambda *_, **__: (elsewhere,))
    q = pared.fit(network(), STATIC, batches(), quiet=True)
    assert record_of(q).profile.model.calls == (elsewhere,)
    assert [line.kernel for line in q.plan if line.name == "0.weight"] == ["int8 static"]


def test_times_that_do_not_depend_on_layers_are_carried_over() -> None:
    known = CallTiming(CALL, 100.0, 50.0, 2.0, None, "no openvino: it cannot", None)
    found = speed._completed(CallTiming(CALL, 10.0, None, 4.0, 3.0), known)
    assert (found.bfloat16_ms, found.modules_ms, found.openvino_ms) == (5.0, 4.0, None)
    assert found.because == "no openvino: it cannot"
    assert speed._completed(known, None) is known


def test_a_busy_machine_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any) -> None:
    q = pared.fit(network(), STATIC, batches(), quiet=True)
    pared.save(q, tmp_path)
    monkeypatch.setattr(time, "process_time", lambda: 0.5 * time.perf_counter())
    busy = pared.tune_speed(tmp_path, network(), batches())
    assert "the machine was busy while this was measured" in caplog.text
    assert "the machine was busy" in pared.report(busy)
    assert "the machine was busy" in pared.report(pared.load(tmp_path, model=network()))
    monkeypatch.setattr(time, "process_time", time.perf_counter)
    caplog.clear()
    assert "busy" not in pared.report(pared.tune_speed(tmp_path, network(), batches()))
    assert not caplog.text


def test_calls_that_are_timed_are_the_largest_the_smallest_and_a_single_sample() -> None:
    calls = [Call((torch.zeros(n, 3),), {}) for n in (4, 9, 2)] + [Call((), {"x": torch.zeros(5, 3), "flag": True})]
    found = speed.chosen(calls, ("x",), lambda *_: True)
    shapes = [tuple((*call.args, *call.kwargs.values())[0].shape) for call in found]
    assert shapes == [(9, 3), (2, 3), (1, 3), (5, 3), (1, 3)]
    assert found[3].kwargs["flag"] is True
    without = speed.chosen(calls, ("x",), lambda *_: False)
    assert [len(values.tensors_in((call.args, dict(call.kwargs)))[0]) for call in without] == [9, 2, 5]
    vector = speed.chosen([Call((torch.zeros(64),), {})], ("x",), lambda *_: True)
    assert len(vector) == 1, "a vector may be one sample, without a batch"


@pytest.mark.whole_models_are_timed
@pytest.mark.slow
def test_tune_speed_writes_what_it_measured_and_leaves_the_file(tmp_path: Path) -> None:
    path = pared.save(pared.fit(network(), STATIC, batches(), quiet=True), tmp_path)
    before = path.read_bytes()
    (tmp_path / "engine.json").unlink()
    tuned = pared.tune_speed(tmp_path, network(), [torch.randn(32, 64)])
    assert path.read_bytes() == before
    data = json.loads((tmp_path / "engine.json").read_text(encoding="utf-8"))
    assert [call["arguments"][0]["shape"] for call in data["calls"][""]] == [[32, 64], [1, 64]]
    assert all(call["float32_ms"] > 0 and call["modules_ms"] > 0 and call["graph_ms"] > 0 for call in data["calls"][""])
    loaded = pared.load(tmp_path, model=network())
    assert record_of(loaded).profile == record_of(tuned).profile
    with torch.no_grad():
        assert torch.equal(loaded(batches()[0]), tuned(batches()[0]))


def test_tune_speed_refuses_what_load_refuses(tmp_path: Path) -> None:
    pared.save(pared.fit(network(), STATIC, batches(), quiet=True), tmp_path)
    with pytest.raises(ConfigError, match="pared.tune_speed: model is a str"):
        pared.tune_speed(tmp_path, "network", batches())  # type: ignore[type-var]  # that is the point


@pytest.mark.whole_models_are_timed
@pytest.mark.slow
def test_the_command_line_tunes(tmp_path: Path) -> None:
    from pared.cli import app

    pared.save(pared.fit(network(), STATIC, batches(), quiet=True), tmp_path)
    options = ["--model", "tests.fitting.test_speed:network", "--calib", "tests.fitting.test_speed:batches"]
    result = CliRunner().invoke(app, ["tune-speed", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("runs ")
    assert "input 64 x 64: float32 " in result.output


@pytest.mark.whole_models_are_timed
@pytest.mark.model
def test_a_real_model_runs_as_a_graph_and_is_as_close(tmp_path: Path) -> None:
    model = minilm.load()
    q = pared.fit(model, PostTrainingQuantConfig(quant_level=0), minilm.calibration()[:3], quiet=True)
    calls = record_of(q).profile.model.calls
    assert {one.kind for one in calls} == {"attention_mask: int64[2], input_ids: int64[2]"}
    assert all(one.graph_ms is not None for one in calls), [one.because for one in calls]
    # Whatever was fastest here in this moment: as a graph it is the same model.
    graph = quantized.assemble(find_tensors(model), contents_of(q), timed(1.0, None, 1.0, None))
    serve(graph, GraphServer(float_forms.outline_of, [calls[0].arguments]))
    texts = minilm.documents()[:16]
    expected = minilm.embed(model, texts)
    assert minilm.distance(minilm.embed(graph, texts), expected) < 0.005
    assert minilm.distance(minilm.embed(q, texts), expected) < 0.005
