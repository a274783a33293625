"""Where the machine was busy, the first calls tell what is fastest; clocks are made up."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.runtime import stopwatch
from pared.runtime.graphs.call_kinds import Argument, Bound
from pared.runtime.profile.profile import Profile
from pared.runtime.profile.timings import CallTiming, Form, ModelTiming, Served
from pared.runtime.record import record_of
from pared.runtime.serving.served import SERVER, serve
from pared.runtime.serving.server import Capture, KindServer
from pared.runtime.serving.settling import SettlingServer
from pared.runtime.stopwatch import Spent, fastest_ms

CALL = (Argument("input", "float32", (8, 64)),)
SECONDS = {"modules": 3.0, "graph": 2.0, "openvino": 1.0}


class Machine:
    """Clocks that forms push on.

    Args:
        busy: other processes have the processors half of the time.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, busy: bool) -> None:
        self.clock = self.processor = self.waited = 0.0
        self.busy = busy
        self.runs: list[str] = []
        patch.setattr(time, "perf_counter", lambda: self.clock)
        patch.setattr(time, "process_time", lambda: self.processor)
        patch.setattr(stopwatch, "waited_seconds", lambda: self.waited)

    def run(self, form: str, threads: int = 2) -> None:
        self.runs.append(form)
        self.clock += SECONDS[form] * (2 if self.busy else 1)
        self.processor += threads * SECONDS[form]
        self.waited += threads * SECONDS[form] * self.busy


class Fixed(KindServer):
    """A form that answers with its seconds."""

    def __init__(self, machine: Machine, form: str, answers: bool = True) -> None:
        super().__init__(lambda model: model, [CALL])
        self.machine, self.form, self.answers = machine, form, answers

    def __deepcopy__(self, memo: dict[int, Any]) -> "Fixed":
        return self

    def warm(self, model: nn.Module, captured: Capture | None = None) -> None:
        pass

    def _answer(self, model: nn.Module, bound: Bound, modules: Callable[[], Any]) -> Any:
        if not self.answers:
            return NotImplemented
        self.machine.run(self.form)
        return torch.tensor(SECONDS[self.form])


class Slow(nn.Module):
    machines: list[Machine] = []  # noqa: RUF012  # the last one counts: copies of a model have lists of their own

    def forward(self, input: Tensor) -> Tensor:  # as in nn.Linear
        assert input.shape[1] == 64
        self.machines[-1].run("modules")
        return torch.tensor(SECONDS["modules"])


def answers(model: nn.Module, count: int) -> list[float]:
    with torch.no_grad():
        return [float(model(torch.zeros(8, 64))) for _ in range(count)]


def settling(machine: Machine, model: nn.Module | None = None, *, without: str = "") -> nn.Module:
    Slow.machines.append(machine)
    model = (model or Slow()).eval()
    names: tuple[Form, ...] = ("graph", "openvino")
    forms = {name: Fixed(machine, name, name != without) for name in names}
    serve(model, SettlingServer(lambda one: one, [CALL], forms, [Served("graph", CALL)]))
    return model


@pytest.mark.parametrize(("without", "best"), [("", 1.0), ("openvino", 2.0)])
def test_the_first_calls_tell_what_is_fastest(monkeypatch: pytest.MonkeyPatch, without: str, best: float) -> None:
    machine = Machine(monkeypatch, busy=False)
    model = settling(machine, without=without)
    assert answers(model, 3) == [2.0] * 3, "one form answers until all is known"
    machine.runs.clear()
    assert answers(model, 2) == [best] * 2
    assert len(machine.runs) == 2, "nothing else runs any more"
    assert answers(copy.deepcopy(model), 3) == [2.0] * 3, "a copy is measured on its own"


class Writing(Slow):
    """Cannot be called twice with the same effect as once.

    Args:
        what: what it writes to.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.count = what, 0

    def forward(self, input: Tensor) -> Tensor:
        self.machines[-1].run("modules")
        if self.what == "an argument":
            input.add_(1)
        else:
            self.count += 1
        return input.sum() + self.count


@pytest.mark.parametrize("what", ["an argument", "an attribute"])
def test_a_call_that_changes_something_is_made_once(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    machine = Machine(monkeypatch, busy=False)
    model = settling(machine, Writing(what))
    for count in range(1, 6):
        x = torch.zeros(8, 64)
        with torch.no_grad():
            model(x)
        assert float(x.max()) == (what == "an argument")
        assert model.count == (count if what == "an attribute" else 0)
    assert machine.runs == ["modules"] * 5


def test_where_the_machine_stays_busy_the_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    machine = Machine(monkeypatch, busy=True)
    model = settling(machine)
    assert answers(model, 8) == [2.0] * 8
    machine.runs.clear()
    assert answers(model, 4) == [2.0] * 4
    assert machine.runs == ["graph"] * 4
    other = settling(machine)
    answers(other, 4)
    machine.busy = False
    answers(other, 3)
    assert answers(other, 1) == [1.0], "the disturbed calls did not count"


def test_several_threads_are_not_given_up_for_what_others_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    machine = Machine(monkeypatch, busy=True)
    runs: dict[str, Callable[[], None]] = {
        "single": lambda: machine.run("graph", 1),
        "double": lambda: machine.run("openvino"),
    }
    assert fastest_ms(runs) == {"single": pytest.approx(2000.0), "double": pytest.approx(2000.0)}, "bounds"
    spent = Spent(4.0, 4.0, 4.0)
    assert spent.is_busy
    assert spent.is_disturbed
    assert (spent.seconds, spent.least(2)) == (4.0, 2.0)
    assert not Spent(2.0, 4.0, 0.01).is_disturbed


def timing(**times: float) -> CallTiming:
    return replace(CallTiming(CALL, 4.0, None, 4.0, None), **times)


@pytest.mark.parametrize(
    ("times", "certain", "doubtful"),
    [
        ({"modules_ms": 4.2}, "float32", "int8"),
        ({"modules_ms": 9.0}, "float32", "float32"),
        ({"bfloat16_ms": 3.0}, "bfloat16", "int8"),
        ({"bfloat16_ms": 1.5}, "bfloat16", "bfloat16"),
        ({"graph_ms": 3.0}, "graph", "int8"),
        ({"graph_ms": 2.0}, "graph", "graph"),
        ({"graph_ms": 2.0, "openvino_ms": 1.5}, "openvino", "graph"),
    ],
)
def test_what_is_doubtful_must_take_half_of_the_time(times: dict[str, float], certain: str, doubtful: str) -> None:
    def chosen(profile: Profile) -> str:
        model = profile.model
        return next(iter(model.forms), model.kernel)

    one = ModelTiming((timing(**times),))
    assert chosen(Profile({"threads": 2}, model=one)) == certain
    assert chosen(Profile({"threads": 2}, model=one, busy=True)) == doubtful
    assert chosen(Profile({"threads": 1}, model=one, busy=True)) == certain, "time on the processor is exact"
    profile = Profile({"threads": 2}, model=one, busy=True)
    assert Profile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize("busy", [False, True])
def test_a_model_that_was_measured_on_a_busy_machine_is_measured_again(tmp_path: Path, busy: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(8, 64)
    q = pared.fit(model, PostTrainingQuantConfig(approach="static", quant_level=0), [x], quiet=True)
    pared.save(q, tmp_path)
    measured = ModelTiming((timing(modules_ms=2.0, graph_ms=1.9),))
    profile = replace(record_of(q).profile, model=measured, busy=busy)
    (tmp_path / "engine.json").write_text(profile.to_json(), encoding="utf-8")
    loaded: Any = pared.load(tmp_path, model=model)
    assert isinstance(vars(loaded)[SERVER], SettlingServer) == busy
    with torch.no_grad():
        for _ in range(12):
            torch.testing.assert_close(loaded(x), q(x), rtol=0.02, atol=0.02)
