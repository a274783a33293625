"""A call is captured once, and not at all where that takes too long."""

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import ModelError, PostTrainingQuantConfig
from pared.fitting import speed
from pared.model.calls import Call
from pared.runtime import float_forms, stopwatch
from pared.runtime.graphs.call_kinds import Argument
from pared.runtime.graphs.capturing import capture, kept
from pared.runtime.graphs.capturing.capture import Captures
from pared.runtime.profile.profile import Profile
from pared.runtime.record import record_of
from pared.runtime.serving.graph_server import GraphServer
from pared.runtime.serving.served import forward_of


@pytest.mark.whole_models_are_timed
def test_a_call_is_captured_once_for_all_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Sequence[Argument]] = []
    unchanged = capture.capture

    def counted(skeleton: nn.Module, arguments: Sequence[Argument], slow: list[str]) -> capture.Captured:
        made.append(arguments)
        return unchanged(skeleton, arguments, slow)

    monkeypatch.setattr(kept, "capture", counted)
    monkeypatch.setattr(speed, "_left", lambda _: 1.0)  # so that layers are also tried all in int8
    monkeypatch.setattr(
        stopwatch, "fastest_ms", lambda forms, *_, **__: {form: 1.0 + (form != "graph") for form in forms}
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    q = pared.fit(model, PostTrainingQuantConfig(quant_level=0), [torch.randn(32, 64)], quiet=True)
    assert record_of(q).profile.model.kernel == "int8"
    assert len(made) == 1


class Scaled(nn.Module):
    """A head tied to its table, and a number that is no tensor."""

    def __init__(self, tied: bool, scale: float) -> None:
        super().__init__()
        self.table, self.head, self.scale = nn.Embedding(64, 64), nn.Linear(64, 64, bias=False), scale
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor, k: object = 1) -> torch.Tensor:
        if isinstance(k, float):
            raise ValueError("only whole ones")
        return self.head(self.table(ids)) * self.scale


def test_captures_tell_apart_what_is_tied_and_types_and_keep_refusals() -> None:
    captures = Captures()
    ids = Argument("ids", "int64", (4, 8))
    untied = captures(Scaled(tied=False, scale=2.0), [ids])
    assert captures(Scaled(tied=False, scale=2.0), [ids]) is untied
    tied = captures(Scaled(tied=True, scale=2.0), [ids])
    assert tied is not untied
    captures(Scaled(tied=True, scale=2.0), [ids, Argument("k", value=1)])
    for _ in range(2):
        with pytest.raises(ModelError, match="only whole ones"):
            captures(Scaled(tied=True, scale=2.0), [ids, Argument("k", value=1.0)])


class Divided(nn.Module):
    """While sizes that may vary are captured, a fake clock goes on by a minute, as the windows of Swin take.

    Args:
        always: so it does while only the number of samples may vary.
    """

    clock: ClassVar[list[float]] = []  # of the class: copies of a model have lists of their own

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.always = nn.Linear(64, 64), nn.Linear(64, 64), always

    def forward(self, x: Tensor) -> Tensor:
        length: object = x.shape[1]
        if self.always or isinstance(length, torch.SymInt):
            self.clock[0] += 60.0
        out: Tensor = self.last(self.first(x).relu())
        return out


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The fake clock of this thread's processor time, and times in which graphs win."""
    clock = [0.0]
    monkeypatch.setattr(Divided, "clock", clock)
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])
    monkeypatch.setattr(
        stopwatch, "fastest_ms", lambda forms, *_, **__: {form: 1.0 + (form != "graph") for form in forms}
    )
    return clock


@pytest.mark.whole_models_are_timed
def test_a_capture_that_takes_too_long_leaves_sizes_fixed_and_the_report_says_so(processor: list[float]) -> None:
    torch.manual_seed(0)
    model = Divided()
    q = pared.fit(model, PostTrainingQuantConfig(quant_level=0), [torch.randn(8, 4, 64)], quiet=True)
    profile = record_of(q).profile
    assert profile.model.forms == ("graph",)
    note = "as a graph, only the number of samples may vary: otherwise its first 1 operators took 60.0 s of processor"
    assert all(note in call.because for call in profile.model.calls)
    assert note in " ".join(pared.report(q).split())
    assert Profile.from_json(profile.to_json()) == profile
    arguments = [Argument("x", "float32", (8, 4, 64))]
    server = GraphServer(float_forms.outline_of, [arguments], Captures())
    with torch.no_grad():
        more, longer = ((torch.randn(3, length, 64),) for length in (4, 5))
        assert server.serve(q, more, {}, forward_of(q)) is not NotImplemented
        assert server.serve(q, longer, {}, forward_of(q)) is NotImplemented
    assert server.reason({"x": longer[0]}).startswith("it takes no inputs of these sizes; only the number of samples")


def test_what_takes_too_long_to_capture_is_not_tried_again_in_its_parts(processor: list[float]) -> None:
    arguments = [Argument("x", "float32", (8, 4, 64))]
    whole = Captures()
    assert whole(Divided(), arguments).note
    assert processor[0] == 60.0
    assert Captures(whole)(Divided(), arguments).note
    assert processor[0] == 60.0, "it began with samples only"
    hopeless = Captures(whole)
    with pytest.raises(ModelError, match="TooSlowError: its first 1 operators took 60.0 s of processor"):
        hopeless(Divided(always=True), arguments)
    assert processor[0] == 120.0
    with pytest.raises(ModelError, match="TooSlowError"):
        Captures(whole)(Divided(always=True), arguments)
    assert processor[0] == 120.0, "nothing was tried"


@pytest.mark.whole_models_are_timed
def test_an_output_that_no_graph_gives_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Keeping(Scaled):
        def forward(self, ids: torch.Tensor, k: object = 1) -> Any:
            return super().forward(ids, k), {"cache": object()}

    def refused(*_: Any) -> capture.Captured:
        raise AssertionError

    monkeypatch.setattr(capture, "capture", refused)
    model = Keeping(tied=False, scale=2.0).eval()
    call = Call((torch.arange(64).view(4, 16),), {})
    (largest, _) = speed.time_calls(model, model, [call], Captures())
    assert "no graph: its output holds: object" in largest.because


@pytest.mark.whole_models_are_timed
@pytest.mark.slow
def test_what_a_user_changes_before_the_first_call_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        stopwatch, "fastest_ms", lambda forms, *_, **__: {form: 1.0 + (form != "graph") for form in forms}
    )
    torch.manual_seed(0)
    q = pared.fit(
        Scaled(tied=False, scale=2.0),
        PostTrainingQuantConfig(quant_level=0),
        [torch.arange(64).view(4, 16)],
        quiet=True,
    )
    assert record_of(q).profile.model.served
    ids = torch.arange(8).view(1, 8)
    before = forward_of(q)(q, ids)
    q.scale = 2.1
    torch.testing.assert_close(q(ids), before * 1.05)
