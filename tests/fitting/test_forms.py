"""The form that runs is as accurate as promised: it is measured and scored as it runs, or it does not run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.errors import EvaluationError
from pared.fitting import speed
from pared.fitting.finishing import forms
from pared.fitting.finishing.forms import Checker
from pared.runtime.graphs.call_kinds import Argument, arguments_of, bind, parameters_of
from pared.runtime.graphs.graph import Graph
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.profile.timings import CallTiming, ModelTiming
from pared.runtime.record import record_of
from pared.runtime.serving import graph_server
from pared.runtime.serving.served import SERVER, forward_of, on_modules

BATCH = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


def closeness(model: nn.Module, q: nn.Module) -> float:
    with torch.no_grad():
        error = (q(BATCH) - model(BATCH)).square().sum() / model(BATCH).square().sum()
    return 1.0 - float(error)


@pytest.fixture
def graphs_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times in which a graph is by far the fastest."""

    def times(model: nn.Module, _: object, calls: Any, *__: object, **___: object) -> tuple[CallTiming, ...]:
        names = parameters_of(model)
        bound = bind(names, calls[0].args, calls[0].kwargs)
        assert bound is not None
        return (CallTiming(arguments_of(bound), 10.0, None, 8.0, 2.0),)

    monkeypatch.setattr(speed, "time_calls", times)
    monkeypatch.setattr(speed, "time_layers", lambda *_, **__: Profile(this_machine()))


def answers_of(q: nn.Module) -> list[str]:
    """What answers two calls of a model: "graph" or "modules"."""
    found = []
    for _ in range(2):
        server = q.__dict__[SERVER]
        with torch.no_grad():
            found.append("modules" if server.serve(q, (BATCH,), {}, forward_of(q)) is NotImplemented else "graph")
    return found


@pytest.mark.usefixtures("graphs_win")
def test_the_score_is_that_of_what_runs(tmp_path: Path) -> None:
    model, scored = network(), list[nn.Module]()

    def score(q: nn.Module) -> float:
        scored.append(q)
        return closeness(model, q)

    q: Any = pared.fit(model, PostTrainingQuantConfig(), [BATCH], score, quiet=True)
    assert len(scored) == 1 + len(q.pared.trials) + 1, "the float model, the trials, and the result as it runs"
    assert q.pared.met
    assert q.pared.score == closeness(model, q)
    assert answers_of(q) == ["graph", "graph"]
    trial = min((one for one in q.pared.trials if one.met), key=lambda one: one.nbytes)
    assert trial.score == closeness(model, on_modules(pared.load(pared.save(q, tmp_path), network())))
    if trial.score != q.pared.score:
        assert f"the search scored it layer by layer in int8: {trial.score:.6g}" in q.report()
    loaded: Any = pared.load(tmp_path, network())
    assert loaded.pared.score == q.pared.score == closeness(model, loaded)
    deployed = yaml.safe_load((tmp_path / "deploy.yaml").read_text())
    assert deployed["outcome"]["score"] == q.pared.score
    assert deployed["runs"][0] == "runs as a graph, each layer in its own kernel (measured on this machine):"
    profile = Profile.from_json((tmp_path / "engine.json").read_bytes())
    (tmp_path / "engine.json").write_text(replace(profile, machine={**profile.machine, "threads": 99}).to_json())
    elsewhere: Any = pared.load(tmp_path, network())
    assert elsewhere.pared.score == trial.score, "of int8 layer by layer, which runs where nothing was measured"
    there = "runs layer by layer: it was timed on another machine, where it runs as a graph; pared.tune_speed times it"
    assert there in " ".join(elsewhere.report().split())


@pytest.mark.usefixtures("graphs_win")
def test_the_file_does_not_depend_on_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(name: str) -> bytes:
        q = pared.fit(network(), PostTrainingQuantConfig(), [BATCH], lambda q: closeness(network(), q), quiet=True)
        return Path(pared.save(q, tmp_path / name)).read_bytes()

    one = made("one")
    monkeypatch.setattr(speed, "time_calls", lambda *_, **__: ())
    assert one == made("other")


def worse(q: nn.Module, model: nn.Module, bad: Callable[[], float]) -> float:
    """A score that is bad for a model that has a graph, as if the graph were less accurate."""
    server = q.__dict__.get(SERVER)
    return bad() if server is not None and getattr(server, "wanted", ()) else closeness(model, q)


def raised() -> float:
    raise EvaluationError("raised ValueError: not like this", where="eval_func", remedy="Look.")


@pytest.mark.usefixtures("graphs_win")
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda: 0.5, "no graph: the criterion is not met by it, at a score of 0.5"),
        (raised, "no graph: eval_func raised"),
    ],
)
def test_a_form_that_does_not_meet_the_criterion_does_not_run(bad: Callable[[], float], reason: str) -> None:
    model = network()
    q: Any = pared.fit(model, PostTrainingQuantConfig(), [BATCH], lambda q: worse(q, model, bad), quiet=True)
    assert q.pared.met
    assert answers_of(q) == ["modules", "modules"]
    assert q.pared.score == record_of(q).outcome.score, "that of the search"
    assert reason in " ".join(q.report().split())


@pytest.mark.usefixtures("graphs_win")
def test_a_form_that_does_far_more_damage_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Graph):
        def __call__(self, bound: Any) -> Any:
            return super().__call__(bound) * 0.95

    monkeypatch.setattr(graph_server, "Graph", Wrong)
    q: Any = pared.fit(network(), PostTrainingQuantConfig(quant_level=0), [BATCH], quiet=True)
    assert answers_of(q) == ["modules", "modules"]
    assert "no graph: it does far more damage than predicted" in " ".join(q.report().split())
    assert q.pared.damage.measured < 1e-3


@pytest.mark.usefixtures("graphs_win")
@pytest.mark.parametrize("place", [(Checker, "accurate"), (speed.Timed, "assembled")], ids=lambda one: one[1])
def test_a_form_that_cannot_be_made_costs_no_search(place: tuple[type, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("not enough for another copy")

    monkeypatch.setattr(*place, fails)
    model = network()
    q: Any = pared.fit(model, PostTrainingQuantConfig(), [BATCH], lambda q: closeness(model, q), quiet=True)
    assert q.pared.met
    assert q.pared.damage.measured is not None
    assert q.pared.score == closeness(model, q)
    assert "runs layer by layer: it could not be made faster: MemoryError: not enough" in " ".join(q.report().split())


@pytest.mark.usefixtures("graphs_win")
def test_the_score_of_a_graph_is_not_that_of_weights_in_codes(tmp_path: Path) -> None:
    model = network()
    q = pared.fit(model, PostTrainingQuantConfig(), [BATCH], lambda q: closeness(model, q), quiet=True)
    pared.save(q, tmp_path)
    profile = replace(Profile.from_json((tmp_path / "engine.json").read_bytes()), score=0.25)
    (tmp_path / "engine.json").write_text(profile.to_json())
    loaded: Any = pared.load(tmp_path, network())
    assert loaded.pared.score == 0.25
    compact: Any = pared.load(tmp_path, network(), memory="small")
    assert compact.pared.score == record_of(compact).outcome.score


@pytest.mark.usefixtures("graphs_win")
@pytest.mark.parametrize("way", ["fit", "load", "tune_speed"])
def test_graphs_are_made_before_the_first_call(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q: Any = pared.fit(network(), PostTrainingQuantConfig(quant_level=0), [BATCH], quiet=True)
    pared.save(q, tmp_path)
    if way == "load":
        q = pared.load(tmp_path, network())
    elif way == "tune_speed":
        q = pared.tune_speed(tmp_path, network(), [BATCH])
    made: list[object] = []
    unchanged = Graph.__init__

    def counted(self: Any, *args: Any) -> None:
        made.append(self)
        unchanged(self, *args)

    monkeypatch.setattr(Graph, "__init__", counted)
    assert answers_of(q) == ["graph", "graph"]
    assert not made
    cold = pared.load(tmp_path, network(), warm=False)
    assert not made
    assert answers_of(cold) == ["graph", "graph"]
    assert len(made) == 1


@pytest.mark.usefixtures("graphs_win")
def test_hooks_of_all_modules_see_no_capture(tmp_path: Path) -> None:
    pared.save(pared.fit(network(), PostTrainingQuantConfig(quant_level=0), [BATCH], quiet=True), tmp_path)
    seen: list[object] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(_))
    try:
        q = pared.load(tmp_path, network())
    finally:
        handle.remove()
    assert not seen
    assert answers_of(q) == ["graph", "graph"]


@pytest.mark.usefixtures("graphs_win")
def test_what_changes_after_loading_counts(tmp_path: Path) -> None:
    pared.save(pared.fit(network(), PostTrainingQuantConfig(quant_level=0), [BATCH], quiet=True), tmp_path)
    q: Any = pared.load(tmp_path, network())
    with torch.no_grad():
        q[0].bias.add_(1.0)
        wanted = on_modules(pared.load(tmp_path, network(), warm=False))
        wanted[0].bias.add_(1.0)
        torch.testing.assert_close(q(BATCH), wanted(BATCH), rtol=0.02, atol=0.05)
        q[2] = nn.Identity()
        assert torch.equal(q(BATCH), q[1](q[0](BATCH)))


def test_a_profile_without_a_form_keeps_the_times_of_the_others() -> None:
    arguments = arguments_of({"x": Tensor(torch.zeros(2, 2))})
    timing = ModelTiming((CallTiming(arguments, 10.0, 9.0, 8.0, 3.0, "", 2.0),))
    profile = Profile(this_machine(), model=timing, submodels={"part": timing})
    assert profile.forms == ("openvino",)
    less = profile.without("openvino", "why")
    assert less.forms == ("graph",)
    assert [call.because for call in (*less.model.calls, *less.submodels["part"].calls)] == ["no openvino: why"] * 2
    none = less.without("graph", "why").without("bfloat16", "why")
    assert none.forms == ()
    assert none.without("graph", "again") == none
    assert Profile.from_json(none.to_json()) == none
    assert Profile.from_json(Profile(this_machine(), score=0.5).to_json()).score == 0.5


def test_bfloat16_is_not_given_up_for_what_answers_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = ((Argument("x", "float32", (rows, 64)),) for rows in (64, 1))
    calls = (CallTiming(large, 9.0, 3.0, 4.0, None, "", 8.0), CallTiming(small, 2.0, 1.9, 2.5, None, "", 1.6))
    profile = Profile(this_machine(), model=ModelTiming(calls))
    assert profile.forms == ("bfloat16", "openvino")
    monkeypatch.setattr(forms, "is_far", lambda damage: damage)
    checker: Any = Checker(network(), lambda one: one, lambda one: "openvino" in one.forms, None)  # type: ignore[return-value]  # profiles stand in for models
    found, _ = checker.accurate(profile)
    assert found.forms == ("bfloat16",)
