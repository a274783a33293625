"""Layers of the user's own, and rules on shapes."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from examples import custom_layer
from torch import Tensor, nn

import pared
from pared import ConfigError, MismatchError, PostTrainingQuantConfig, Rule
from pared.fitting.timing import layers as timed_layers
from pared.formats.views import OWN_ROWS
from pared.runtime.layers.counterpart import Counterpart
from pared.runtime.layers.table import LAYERS
from pared.runtime.profile.timings import Timing
from tests.ratios import snr


@pytest.fixture(autouse=True)
def _tables_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    layers, rows = dict(LAYERS), dict(OWN_ROWS)
    # int8 is taken to be the fastest everywhere, so that it runs.
    monkeypatch.setattr(timed_layers, "measure", lambda forms, shape, dtype, call: Timing(shape, 3.0, 2.0, 1.0))
    yield
    for table, before in ((LAYERS, layers), (OWN_ROWS, rows)):
        table.clear()
        table.update(before)


class Twice(nn.Module):
    """Two raw parameters through plain functions; the second holds outputs in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(96, 64))
        self.second = nn.Parameter(torch.randn(96, 32) * torch.logspace(-2, 2, 32))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.first).relu() @ self.second


BATCHES = [torch.randn(16, 64, generator=torch.Generator().manual_seed(n)) for n in range(4)]
EIGHT = PostTrainingQuantConfig(quant_level=0)


def error(model: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        exact = torch.cat([model(x) for x in BATCHES])
        return float((torch.cat([other(x) for x in BATCHES]) - exact).square().sum() / exact.square().sum())


def test_a_layer_nobody_has_heard_of_shrinks_without_being_registered() -> None:
    torch.manual_seed(0)
    model = Twice()
    q = pared.fit(model, EIGHT, BATCHES)
    assert q.nbytes < 0.4 * 4 * (96 * 64 + 96 * 32)
    assert error(model, q) < 1e-3


def test_rows_that_are_registered_have_steps_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Twice()
    pared.register(Twice, rows={"second": 1})
    q = pared.fit(model, EIGHT, BATCHES)
    assert q.state_dict()["second_step"].shape == (32,)
    assert error(model, q) < 2e-4
    pared.save(q, tmp_path)
    OWN_ROWS.clear()
    assert torch.equal(pared.load(tmp_path, model=Twice())(BATCHES[0]), q(BATCHES[0])), "the file knows its rows"


def test_a_weight_that_is_registered_runs_in_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Twice()
    pared.register(Twice, int8=["first"])
    q = pared.fit(model, EIGHT, BATCHES)
    assert isinstance(q, Counterpart)
    assert {line.name: line.kernel.split()[0] for line in q.plan} == {"first": "int8", "second": "float"}
    with torch.no_grad():
        decoded = copy.deepcopy(model)
        decoded.first.data = q.pared_decode("first")
        assert 0 < error(decoded, q) < 2e-3
        pared.save(q, tmp_path)
        assert torch.equal(pared.load(tmp_path, model=Twice())(BATCHES[0]), q(BATCHES[0]))
    LAYERS.pop(Twice)
    with pytest.raises(MismatchError, match="with the same layers registered"):
        pared.load(tmp_path, model=Twice())


def test_the_example_runs_one_factor_in_int8() -> None:
    model, quantized = custom_layer.compress()
    kernels = {line.name: line.kernel for line in quantized.pared.plan}
    assert kernels["0.up"] == "int8 dynamic"
    assert kernels["0.down"] == "float"
    assert quantized.state_dict()["0.down_step"].shape == (192,)
    x = custom_layer.calibration()[0]
    with torch.no_grad():
        exact = model(x)
        assert float((quantized(x) - exact).square().sum() / exact.square().sum()) < 2e-3


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"layer": 3}, "is not a class of modules"),
        ({"layer": nn.Module}, "is not a class of modules"),
        ({"layer": Twice, "int8": "first"}, "rows and int8 must name each attribute once"),
        ({"layer": Twice, "rows": {"a b": 1}}, "rows and int8 must name each attribute once"),
        ({"layer": Twice, "rows": {"second": -1}}, "must be dimensions: whole numbers"),
        ({"layer": Twice, "rows": {"second": 1.0}}, "must be dimensions: whole numbers"),
        ({"layer": Twice, "rows": ["second"]}, "rows and int8 must name each attribute once"),
        ({"layer": Twice, "int8": ["first", "first"]}, "rows and int8 must name each attribute once"),
        ({"layer": Twice, "int8": None}, "rows and int8 must name each attribute once"),
        ({"layer": Twice, "forward": print}, "forward must be a function"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        pared.register(arguments.pop("layer"), **arguments)
    assert Twice not in LAYERS


def test_a_rule_on_shapes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    q = pared.fit(model, PostTrainingQuantConfig(rules=[Rule(lambda shape: len(shape) == 4, bits=4)]))
    assert {line.name: line.bits for line in q.plan if line.name.endswith("weight")} == {"0.weight": 4, "2.weight": 8.0}
    with pytest.raises(ConfigError, match=r"matches no tensor of the model"):
        pared.fit(model, PostTrainingQuantConfig(rules=[Rule(lambda shape: len(shape) == 9, keep=True)]))


def test_rows_that_are_no_outputs_of_the_product_run_on_floats() -> None:
    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64) * torch.logspace(-2, 2, 64))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    pared.register(Across, rows={"weight": 1}, int8=["weight"])
    torch.manual_seed(0)
    model = Across()
    assert error(model, pared.fit(model, PostTrainingQuantConfig(quant_level=0, approach="dynamic"))) < 1e-3


def test_a_subclass_with_rows_of_its_own_is_read_by_them() -> None:
    class Columns(nn.Embedding):
        pass

    class Turned(nn.LSTM):
        pass

    pared.register(Columns, rows={"weight": 1})
    pared.register(Turned, rows={"weight_ih_l0": 1})
    model = nn.Sequential(Columns(300, 250), Turned(250, 16)).eval()
    ids = torch.arange(300)[None]
    q = pared.fit(model, PostTrainingQuantConfig(quant_level=0, approach="dynamic"))
    with torch.no_grad():
        assert torch.allclose(q[0](ids), model[0](ids), atol=0.03)
        assert torch.allclose(q(ids)[0], model(ids)[0], atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rows": {"third": 0}}, "pared.register(Twice): 0 has no weight 'third'\n  Its weights are: first, second."),
        ({"int8": ["third"]}, "pared.register(Twice): 0 has no weight 'third'\n  Its weights are: first, second."),
        (
            {"rows": {"second": 5}},
            "pared.register(Twice): rows=(5,) do not fit 0.second, which has 2 dimensions\n"
            "  Count dimensions from 0, which is the default.",
        ),
    ],
)
def test_what_a_layer_does_not_have_is_refused_by_fit(arguments: dict[str, Any], words: str) -> None:
    pared.register(Twice, **arguments)
    with pytest.raises(ConfigError) as error:
        pared.fit(nn.Sequential(Twice()))
    assert str(error.value) == words


def test_the_last_registration_holds_and_models_made_before_keep_theirs() -> None:
    torch.manual_seed(0)
    model = Twice()
    pared.register(Twice, rows={"second": 1}, int8=["first"])
    before = pared.fit(model, EIGHT, BATCHES)
    expected = before(BATCHES[0])
    pared.register(Twice)
    after = pared.fit(model, EIGHT, BATCHES)
    assert {line.kernel for line in after.plan} == {"float"}
    assert after.state_dict()["second_step"].shape != (32,)
    assert torch.equal(before(BATCHES[0]), expected)
    pared.register(Twice, rows={"second": 1}, int8=["first"])
    assert torch.equal(copy.deepcopy(before)(BATCHES[0]), expected)


def test_a_registration_that_replaces_another_says_so(caplog: pytest.LogCaptureFixture) -> None:
    pared.register(Twice, rows={"second": 1}, int8=["first"])
    pared.register(Twice, rows={"second": 1}, int8=("first",))
    pared.register(nn.Linear, rows={"weight": 0})  # what holds without it
    assert caplog.messages == []
    pared.register(Twice, rows={"second": 1})
    pared.register(Twice)
    pared.register(nn.Linear, int8=["weight"], forward=F.linear)
    assert [text.partition(" replaces what was known of this layer")[0] for text in caplog.messages] == [
        *["pared.register(Twice)"] * 2,
        "pared.register(Linear)",
    ]


def test_a_subclass_is_what_its_base_was_registered_as_until_it_says_otherwise() -> None:
    class Thrice(Twice):
        pass

    torch.manual_seed(0)
    model = Thrice()
    pared.register(Twice, rows={"second": 1}, int8=["first"])
    q = pared.fit(model, EIGHT, BATCHES)
    assert {line.name: line.kernel.split()[0] for line in q.plan} == {"first": "int8", "second": "float"}
    assert q.state_dict()["second_step"].shape == (32,)
    pared.register(Thrice, rows={"second": 0})
    q = pared.fit(model, EIGHT, BATCHES)
    assert {line.name: line.kernel.split()[0] for line in q.plan} == {"first": "int8", "second": "float"}
    assert q.state_dict()["second_step"].numel() == 96


def test_a_built_in_layer_keeps_its_kernels() -> None:
    before = LAYERS[nn.Linear]
    pared.register(nn.Linear, rows={"weight": 0})
    assert LAYERS[nn.Linear] is before


def test_layers_of_different_sizes_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outputs, 64))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, weight=self.weight)

    timed = []

    def measure(forms: Any, shape: Any, *_: object) -> Timing:
        timed.append(forms["float32"].weight.shape)
        return Timing(shape, 3.0, 2.0, 1.0)

    monkeypatch.setattr(timed_layers, "measure", measure)
    pared.register(Wide, int8=["weight"])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Wide(8), Wide(4096)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).sum() + self.b(x)

    model = Net()
    q = pared.fit(model, PostTrainingQuantConfig(quant_level=0, approach="dynamic"), BATCHES)
    assert sorted(timed) == [(8, 64), (4096, 64)]
    x = BATCHES[0]
    assert not torch.equal(q.b(x), F.linear(x, q.b.weight)), "a weight given by name runs in int8, too"
    assert snr(q.b(x), model.b(x)) > 25


def test_a_rule_that_raises_is_told() -> None:
    with pytest.raises(ConfigError, match=r"its function raised IndexError for the shape \(4,\) of 0.bias"):
        pared.fit(nn.Sequential(nn.Linear(4, 4)), PostTrainingQuantConfig(rules=[Rule(lambda s: s[1] == 9, keep=True)]))
