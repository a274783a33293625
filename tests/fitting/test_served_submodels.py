"""Parts that are called by themselves: what answers them, and that nothing else changes."""

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.model.tensors import find_tensors
from pared.runtime import float_forms, quantized
from pared.runtime.graphs.call_kinds import bind, parameters_of
from pared.runtime.layers.counterpart import Counterpart
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.profile.timings import ModelTiming, Timing
from pared.runtime.record import contents_of, record_of
from pared.runtime.serving.float_copy import FloatServer
from pared.runtime.serving.graph_server import GraphServer
from pared.runtime.serving.served import SERVER, forward_of
from tests.fitting.hearing import FLOAT, GRAPH, HALF, Encoder, call, model, timing
from tests.runtime.test_merging import lost

_TIES = 1e-6  # of the energy: products of a few rows round otherwise than those that a graph fuses with neighbours


@pytest.fixture(scope="module")
def contents() -> Any:
    config = PostTrainingQuantConfig(quant_level=0, approach="static")
    heard = call()
    q = pared.fit(model(), config, [{"x": heard.args[0], **heard.kwargs}], quiet=True)
    return contents_of(q)


def assembled(contents: Any, part: ModelTiming, whole: ModelTiming | None = None) -> Any:
    profile = Profile(this_machine(), model=whole or ModelTiming(), submodels={"body.encoder": part})
    return quantized.assemble(find_tensors(model()), contents, profile)


@pytest.mark.parametrize("part", [GRAPH, HALF], ids=["graph", "bfloat16"])
@pytest.mark.slow
def test_a_part_answers_by_itself_and_inside_the_model(contents: Any, part: ModelTiming) -> None:
    q, plain, heard = assembled(contents, part), assembled(contents, ModelTiming()), call()
    encoder, x = q.body.encoder, heard.args[0]
    assert isinstance(vars(encoder)[SERVER], FloatServer if part is HALF else GraphServer)
    assert isinstance(encoder, Encoder)
    asked: list[object] = []
    answer = vars(encoder)[SERVER].serve

    def noted(*arguments: Any) -> Any:
        asked.append(answer(*arguments))
        return asked[-1]

    vars(encoder)[SERVER].serve = noted  # to see what it answers
    with torch.no_grad():
        expected, whole = forward_of(encoder)(encoder, x), plain(*heard.args, **heard.kwargs)
        encoder(x)  # makes what answers
        found = encoder(x)
        assert found is asked[-1]
        assert lost(found, expected) < (_TIES if part is GRAPH else 1e-3)
        inside = q(*heard.args, **heard.kwargs)
        assert len(asked) == 3
        assert (inside - whole).square().sum() < 1e-3 * whole.square().sum()
        assert asked[-1] is not NotImplemented
        encoder(x.double().float()[None])
        assert asked[-1] is NotImplemented, "of another rank"


@pytest.mark.slow
def test_a_part_changes_neither_file_nor_state_nor_export(contents: Any, tmp_path: Path) -> None:
    q, plain = assembled(contents, HALF), assembled(contents, ModelTiming())
    assert pared.save(q, tmp_path / "a").read_bytes() == pared.save(plain, tmp_path / "b").read_bytes()
    assert list(q.state_dict()) == list(plain.state_dict())
    loaded = pared.load(tmp_path / "a", model=model())
    assert isinstance(vars(loaded.body.encoder)[SERVER], FloatServer)
    assert record_of(loaded).profile == record_of(q).profile
    floats = float_forms.skeleton_of(q)
    assert [type(one) for one in floats.modules()] == [type(one) for one in model().modules()]


def test_copies_and_pickles_of_a_part(contents: Any) -> None:
    q, x = assembled(contents, HALF), call().args[0]
    with torch.no_grad():
        expected = q.body.encoder(x)
        copied = copy.deepcopy(q)
        assert vars(copied.body.encoder)[SERVER] is not vars(q.body.encoder)[SERVER]
        assert torch.equal(copied.body.encoder(x), expected)
        assert torch.equal(copy.copy(q.body.encoder)(x), expected)
        file = io.BytesIO()
        torch.save(q.body.encoder, file)
        file.seek(0)
        alone = torch.load(file, weights_only=False)
        assert type(alone) is Encoder
        assert torch.equal(alone(x), forward_of(q.body.encoder)(q.body.encoder, x))


def test_a_part_steps_back_for_hooks(contents: Any) -> None:
    q, x = assembled(contents, HALF), call().args[0]
    seen: list[Any] = []
    q.body.encoder.layers[0].register_forward_hook(lambda *_: seen.append(None))
    with torch.no_grad():
        assert torch.equal(q.body.encoder(x), forward_of(q.body.encoder)(q.body.encoder, x))
    assert len(seen) == 2


def test_a_part_that_is_fastest_in_float_is_left_to_its_layers(contents: Any) -> None:
    q = assembled(contents, FLOAT)
    assert {one.kernel for one in record_of(q).running.values()} == {"int8"}
    assert type(q.body.encoder) is Encoder


@pytest.mark.slow
def test_a_part_answers_callers_with_flags_of_their_own(contents: Any) -> None:
    class Flagged(Encoder):
        def forward(self, x: Tensor, scale: float = 1.0, **flags: Any) -> Any:
            out = super().forward(x) * scale
            return {"out": out} if flags.get("return_dict") else out

    source = model()
    source.body.encoder.__class__ = Flagged
    profile = Profile(this_machine(), submodels={"body.encoder": GRAPH})
    q: Any = quantized.assemble(find_tensors(source), contents, profile)
    encoder, x = q.body.encoder, call().args[0]
    own = forward_of(encoder)
    server = vars(encoder)[SERVER]
    assert isinstance(server, GraphServer)
    with torch.no_grad():
        for flags in ({"return_dict": True, "attentions": False}, {"scale": 2.0}, {}):
            expected, found = own(encoder, x, **flags), encoder(x, **flags)
            encoder(x, **flags)
            assert type(found) is type(expected)
            answers = (found["out"], expected["out"]) if flags.get("return_dict") else (found, expected)
            assert lost(*answers) < _TIES
            assert server.serve(encoder, (x,), flags, own) is not NotImplemented
        for scale in range(3, 20):  # no graph for each of them
            assert lost(encoder(x, scale=float(scale)), own(encoder, x, scale=float(scale))) < _TIES
        assert len(server._graphs) <= 3


def test_a_slice_of_a_served_sequence_runs_by_itself(contents: Any) -> None:
    profile = Profile(this_machine(), submodels={"body.encoder.layers": GRAPH})
    q: Any = quantized.assemble(find_tensors(model()), contents, profile)
    part, x = q.body.encoder.layers[:2], call().args[0]
    with torch.no_grad():
        assert torch.equal(part(x), q.body.encoder.layers[1](q.body.encoder.layers[0](x)))


def test_what_is_given_by_position_only_is_answered_by_modules() -> None:
    class Positional(nn.Module):
        def forward(self, x: Tensor, /, scale: float = 1.0) -> Tensor:
            return x * scale

    assert bind(parameters_of(Positional()), (torch.zeros(1),), {}) is None


def test_a_model_that_is_fastest_in_float_has_no_parts(contents: Any) -> None:
    q = assembled(contents, HALF, timing(1.0, 2.0, 3.0, 2.0))
    assert {line.kernel for line in q.plan} == {"float"}
    assert type(q.body.encoder) is Encoder


def test_a_profile_of_parts_that_are_not_there_is_harmless(contents: Any) -> None:
    profile = Profile(this_machine(), submodels={"body.nothing": HALF})
    q, heard = quantized.assemble(find_tensors(model()), contents, profile), call()
    with torch.no_grad():
        assert q(*heard.args, **heard.kwargs).shape == (4, 64)


def test_a_profile_survives_json() -> None:
    profile = Profile(
        this_machine(), {"body.small": Timing((4, 64), 2.0, 3.0, 1.0)}, GRAPH, {"body.encoder": HALF}, together=True
    )
    assert Profile.from_json(profile.to_json()) == profile
    assert replace(profile, submodels={}) != profile


def in_codes(source: nn.Module, x: Tensor) -> Any:
    """The quantized model with every layer in int8 that may be, whatever is fastest."""
    found = pared.fit(source, PostTrainingQuantConfig(quant_level=0), [x], quiet=True)
    return quantized.assemble(find_tensors(source), contents_of(found), Profile(this_machine()))


def test_floats_of_a_quantized_model_keep_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(1200, 64), nn.Linear(64, 1200, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.out(self.table(ids))
            return logits

    ids = torch.arange(40).view(4, 10)
    q = in_codes(Tied().eval(), ids)
    floats: Any = float_forms.floats_of(q)
    assert floats.out.weight is floats.table.weight
    assert isinstance(q.out, Counterpart), "there are codes to decode"
    assert torch.equal(floats.out.weight, q.out.weight)


@pytest.mark.parametrize("layer", [lambda: nn.LSTM(64, 64), lambda: nn.MultiheadAttention(64, 4)], ids=["lstm", "mha"])
def test_floats_of_layers_of_many_weights(layer: Any) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = (self.layer(x) if isinstance(self.layer, nn.LSTM) else self.layer(x, x, x))[0]
            return out

    torch.manual_seed(0)
    x = torch.randn(5, 3, 64)
    q = in_codes(Wrapped().eval(), x)
    floats: Any = float_forms.floats_of(q)
    assert any(isinstance(one, Counterpart) for one in q.modules())
    assert not any(tensor.is_meta for tensor in (*floats.parameters(), *getattr(floats.layer, "_flat_weights", ())))
    with torch.no_grad():
        expected = q(x)
        assert (floats(x) - expected).square().sum() < 1e-2 * expected.square().sum()
