"""Which parts are called by themselves, and that they are timed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.fitting import speed
from pared.fitting.submodels import find_submodels
from pared.model.calls import Call
from pared.runtime import stopwatch
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.record import record_of
from tests.fitting.hearing import FLOAT, HALF, Body, Encoder, Hearing, call, model


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What each layer of the model takes, by its name, on a clock that nothing else moves."""
    clock = [0.0]
    taken = {"body.encoder.layers.0": 4.0, "body.encoder.layers.2": 3.0, "body.decoder.0": 2.0, "body.small": 1.0}
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    run = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        clock[0] += taken[self.called]
        return run(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return taken


def named(one: nn.Module) -> nn.Module:
    """The model, whose layers know their names."""
    for name, module in one.named_modules():
        module.called = name
    return one


def test_a_part_is_given_inputs_alone_and_is_neither_a_layer_nor_nearly_everything(seconds: dict[str, float]) -> None:
    heard = call()
    found = find_submodels(named(model()), heard)
    # The body is given all inputs, the decoder what was computed, and `small` is a layer.
    assert list(found) == ["body.encoder"], "the outermost"
    assert found["body.encoder"].args[0] is heard.args[0]
    seconds["body.decoder.0"] = 40.0
    assert find_submodels(named(model()), heard) == {}, "the encoder takes too little of the time"
    seconds["body.encoder.layers.0"] = 1000.0
    assert find_submodels(named(model()), heard) == {}, "the encoder is nearly everything"
    assert find_submodels(nn.Linear(64, 64), Call((heard.args[0],), {})) == {}


def test_of_a_single_input_the_wrapper_is_a_part_if_it_is_not_nearly_everything(seconds: dict[str, float]) -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Body()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body.decoder(self.body.encoder(x))
            return out

    assert list(find_submodels(named(Alone()), Call(call().args, {}))) == ["body.encoder"]


@pytest.mark.usefixtures("seconds")
def test_the_parts_of_all_kinds_of_calls_are_found(seconds: dict[str, float]) -> None:
    class Answering(Hearing):
        """Is also given what its encoder gave before, as decoding is."""

        def forward(self, *args: Any, encoded: Tensor | None = None, **kwargs: Any) -> Any:
            if encoded is None:
                return super().forward(*args, **kwargs)
            return self.body.decoder(encoded)

    torch.manual_seed(0)
    heard, later = call(), Call((), {"encoded": torch.randn(64, 64, 64)})
    assert list(speed._submodels(named(Answering().eval()), [heard, later])) == ["body.encoder"]
    assert list(speed._submodels(named(Answering().eval()), [later, heard])) == ["body.encoder"]
    assert speed._submodels(named(Answering().eval()), [later]) == {}


def test_what_is_called_twice_is_no_part() -> None:
    class Twice(Hearing):
        def forward(self, x: Tensor, said: Tensor) -> Tensor:
            both: Tensor = self.body(x, said) + self.body.encoder(x)
            return both

    assert find_submodels(named(Twice().eval()), call()) == {}


@pytest.mark.usefixtures("seconds")
def test_finding_leaves_no_hooks() -> None:
    one = named(model())
    find_submodels(one, call())
    assert find_submodels(one, Call((), {})) == {}, "a call that cannot be made again has no submodels"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in one.modules())


@pytest.mark.usefixtures("seconds")
def test_objects_that_a_model_makes_are_no_inputs() -> None:
    class Cached(Body):
        def forward(self, x: Tensor, said: Tensor) -> Tensor:
            encoded: Tensor = self.encoder(x, object())
            return encoded + said

    class Taking(Encoder):
        def forward(self, x: Tensor, cache: object = None) -> Tensor:
            return super().forward(x)

    one = model()
    one.body.__class__ = Cached
    one.body.encoder.__class__ = Taking
    assert "body.encoder" not in find_submodels(named(one), call())


@pytest.mark.whole_models_are_timed
@pytest.mark.slow
def test_fit_times_parts() -> None:
    heard = call()
    batch = {"x": heard.args[0].repeat(64, 1), "said": heard.kwargs["said"].repeat(64, 1)}
    q = pared.fit(model(), PostTrainingQuantConfig(quant_level=0), [batch], quiet=True)
    # What takes the time, and what is fastest, is up to the machine.
    assert set(record_of(q).profile.submodels) <= {"body.encoder", "body.encoder.layers"}
    for one in record_of(q).profile.submodels.values():
        assert one.forms
        assert {call.arguments[0].shape for call in one.calls} == {(256, 64), (1, 64)}


def test_a_part_is_timed_and_kept_if_something_answers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"half": HALF.calls, "float": FLOAT.calls}
    for name, calls in times.items():
        asked: list[type[nn.Module]] = []

        def time_calls(one: nn.Module, *_: Any, calls: Any = calls, **_options: Any) -> Any:
            asked.append(type(one))  # noqa: B023  # it is called before the next turn
            return calls if isinstance(one, Encoder) else ()

        monkeypatch.setattr(speed, "time_calls", time_calls)
        monkeypatch.setattr(speed, "time_layers", lambda *_, **__: Profile(this_machine()))
        monkeypatch.setattr(speed, "find_submodels", lambda *_: {"body.encoder": Call(call().args, {})})
        heard = call()
        config = PostTrainingQuantConfig(quant_level=0, approach="static")
        q: Any = pared.fit(model(), config, [{"x": heard.args[0], **heard.kwargs}], quiet=True)
        assert asked == [Encoder, Hearing]
        assert list(record_of(q).profile.submodels) == (["body.encoder"] if name == "half" else [])
        assert hasattr(q.body.encoder, "_pared_server") is (name == "half")
