"""Recurrent layers in OpenVINO: every kind, each way to be set up and to be called, and models that have them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import openvino
import pytest
import torch
from openvino import opset13
from torch import Tensor, fx, nn

import pared
from pared import PostTrainingQuantConfig
from pared.runtime.graphs.call_kinds import arguments_of
from pared.runtime.graphs.capturing.capture import FlatModel, capture, exported
from pared.runtime.openvino.graph import OpenVinoGraph
from pared.runtime.openvino.translation.operators import translated
from tests.ratios import snr
from tests.runtime.test_graphs import bound_of

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # warnings of torch about itself

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "RNN with relu": partial(nn.RNN, nonlinearity="relu"),
}
INPUTS, HIDDEN = 5, 7


class Whole(nn.Module):
    """All that a layer gives, and its output once more, which something else reads."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *state: Tensor) -> list[Tensor]:
        first = (state if len(state) > 1 else state[0]) if state else None
        out, last = self.layer(x, first)
        return [out, *(last if isinstance(last, tuple) else [last]), out.sum(-1)]


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("layers", "both"), [(1, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_translated(kind: str, layers: int, both: bool, batch_first: bool, bias: bool, given_state: bool) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](INPUTS, HIDDEN, layers, bidirectional=both, batch_first=batch_first, bias=bias)
    model = Whole(layer).eval()

    def call(batch: int, steps: int) -> tuple[Tensor, ...]:
        x = torch.randn(batch, steps, INPUTS) if batch_first else torch.randn(steps, batch, INPUTS)
        states = [torch.randn(layers * (1 + both), batch, HIDDEN) for _ in range(2 if kind == "LSTM" else 1)]
        return x, *(states if given_state else [])

    program = exported(FlatModel(model, (call(3, 4), {}), list), lambda rank: range(rank - 1))
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    made = translated(graph)
    weights = {name.replace(".", "_"): tensor.detach().numpy() for name, tensor in layer.named_parameters()}
    for parameter in list(made.get_parameters()):
        name = parameter.get_friendly_name()
        value = next((value for known, value in weights.items() if name.endswith(known)), None)
        if value is not None:
            for target in list(parameter.output(0).get_target_inputs()):
                target.replace_source_output(opset13.constant(value).output(0))
            made.remove_parameter(parameter)
    compiled = openvino.Core().compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = call(6, 4)
    found = compiled([one.numpy() for one in x])
    assert len(found) == len(model(*x))
    for place, expected in enumerate(model(*x)):
        torch.testing.assert_close(torch.from_numpy(found[place]), expected, rtol=0, atol=1e-5)


class Uses(nn.Module):
    """What models make of an LSTM."""

    def __init__(self, use: Callable[[Uses, Tensor], Tensor | list[Tensor]]) -> None:
        super().__init__()
        self.use = use
        self.rnn, self.other = nn.LSTM(INPUTS, HIDDEN), nn.LSTM(INPUTS, HIDDEN)
        self.first = nn.Parameter(torch.randn(1, 1, HIDDEN))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        return self.use(self, x)


def same_state(model: Uses, x: Tensor) -> Tensor:
    state = model.first.expand(1, x.shape[1], HIDDEN) * 1.0
    out: Tensor = model.rnn(x, (state, state))[0]
    return out


USES: dict[str, Callable[[Uses, Tensor], Tensor | list[Tensor]]] = {
    "the last state": lambda model, x: model.rnn(x)[1][0],
    "the last cells": lambda model, x: model.rnn(x)[1][1],
    "nothing": lambda model, x: [x * 2, model.rnn(x)[0]][0],
    "one state twice": same_state,
    "one input twice": lambda model, x: model.rnn(x * 2)[0] + model.other(x * 2)[0],
    "the same input": lambda model, x: (lambda y: model.rnn(y)[0] + model.other(y)[0])(x * 2),
    "its input is an output": lambda model, x: (lambda y: [y, model.rnn(y)[0]])(x * 2),
    "called twice": lambda model, x: model.rnn(x, model.rnn(x)[1])[0],
}


@pytest.mark.parametrize("use", USES)
def test_what_models_make_of_it(use: str) -> None:
    torch.manual_seed(0)
    model, x = Uses(USES[use]).eval().requires_grad_(False), torch.randn(4, 3, INPUTS)
    conf = PostTrainingQuantConfig(approach="weight_only", quant_level=0)
    q = pared.fit(model, conf, [x], quiet=True)
    bound = bound_of(q, {"x": x})
    graph = OpenVinoGraph(q, capture(Uses(USES[use]).eval(), arguments_of(bound)))
    with torch.no_grad():
        found, wanted = graph(bound), q(x)
    for ours, theirs in zip(found, wanted, strict=True) if isinstance(wanted, list) else [(found, wanted)]:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)


class Tagger(nn.Module):
    """A table, two LSTMs of which the second reads all of the first, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 24)
        self.first = nn.LSTM(24, 32, batch_first=True, bidirectional=True)
        self.second = nn.GRU(64, 32, batch_first=True)
        self.head = nn.Linear(32, 9)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(self.table(ids))[0])[0])
        return out


@pytest.fixture(scope="module")
def tagger() -> nn.Module:
    torch.manual_seed(0)
    calls = [torch.randint(0, 40, (8, 12)) for _ in range(4)]
    return pared.fit(Tagger().eval(), PostTrainingQuantConfig(quant_level=0), calls, quiet=True)


def test_a_model_with_layers_in_codes_is_what_its_modules_are(tagger: nn.Module) -> None:
    torch.manual_seed(1)
    bound = bound_of(tagger, {"ids": torch.randint(0, 40, (8, 12))})
    floats = Tagger().eval()
    graph = OpenVinoGraph(tagger, capture(floats, arguments_of(bound)))
    with torch.no_grad():
        assert snr(tagger(bound["ids"]), graph(bound)) > 25
        more = bound_of(tagger, {"ids": torch.randint(0, 40, (3, 12))})
        assert snr(tagger(more["ids"]), graph(more)) > 25


def test_an_export_holds_them(tagger: nn.Module, tmp_path: Path) -> None:
    ids = torch.randint(0, 40, (8, 12))
    exported_ = pared.export(tagger, tmp_path / "model.xml", (ids,), to="openvino")
    assert not {name for name in exported_.floats if "weight" in name}
    compiled = openvino.Core().compile_model(str(exported_.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        assert snr(tagger(ids), torch.from_numpy(compiled([ids.numpy()])[0])) > 25
