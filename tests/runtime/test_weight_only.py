"""Weights in codes, inputs in bfloat16: the product against a slow reference, and models that are loaded so."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared import ConfigError, PostTrainingQuantConfig, Rule
from pared.formats.coded import Coded, Grid
from pared.formats.views import View
from pared.runtime.kernels import weight_only
from pared.runtime.layers.counterpart import Counterpart
from pared.runtime.record import record_of

HALF_UNIT = 2.0**-8  # of bfloat16: the largest relative error of a rounding


def weight(rows: int, columns: int, per_row: bool = True, scaled: bool = False) -> Coded:
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    parts = {"codes": codes, "step": torch.rand(rows if per_row else ()) * 0.01 + 0.001}
    if scaled:
        parts["scale"] = torch.rand(columns) + 0.5
    view = View((rows, columns), (0,) if per_row else ())
    return Coded(Grid("int8", scaled=scaled), (rows, columns), torch.bfloat16, parts, view)


@pytest.mark.parametrize("shape", [(33,), (32,), (1, 96), (12, 64), (13, 64), (4, 40), (2, 3, 50, 33), (0, 32)])
@pytest.mark.parametrize(("per_row", "scaled"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_as_exact_as_bfloat16(shape: tuple[int, ...], per_row: bool, scaled: bool, biased: bool) -> None:
    torch.manual_seed(0)
    coded = weight(17, shape[-1], per_row, scaled)
    x, bias = torch.randn(shape).bfloat16(), torch.randn(17).bfloat16() if biased else None
    assert weight_only.takes(x, coded)
    found = weight_only.product(x, coded, bias)
    assert (found.dtype, found.shape) == (torch.bfloat16, (*shape[:-1], 17))
    step = coded.parts["step"].double().reshape(-1, 1)
    exact = coded.parts["codes"].double() * step * (coded.parts["scale"].double() if scaled else 1)
    product = x.double() @ exact.T
    total = product + (0 if bias is None else bias.double())
    bound = HALF_UNIT * (product.abs() + total.abs()) + 1e-6
    if scaled:  # the scaled input is rounded as well
        bound += HALF_UNIT * (x.double().abs() @ exact.abs().T)
    assert bool(((found.double() - total).abs() <= bound * (1 + 2 * HALF_UNIT)).all())


def test_what_the_product_does_not_take() -> None:
    x, coded = torch.zeros(2, 33), weight(17, 33)
    assert not weight_only.takes(x, coded)
    wide = Coded(
        Grid("int16"), (17, 33), torch.bfloat16, {**coded.parts, "codes": coded.parts["codes"].short()}, coded.view
    )
    assert not weight_only.takes(x.bfloat16(), wide)


class Words(nn.Module):
    """A table that is the head as well, a layer of wide codes, a convolution, and angles in no state dict."""

    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.up, self.wide = nn.Linear(32, 48), nn.Linear(48, 32)
        self.mix = nn.Conv1d(32, 32, 3, padding=1)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("angles", torch.linspace(0, 1, 32) ** 3, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.norm(x + self.wide(torch.relu(self.up(x)))) * self.angles.cos().to(x.dtype)
        out: Tensor = self.head(x + self.mix(x.transpose(1, 2)).transpose(1, 2))
        return out


IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    conf = PostTrainingQuantConfig(approach="weight_only", rules=[Rule("wide.weight", bits=12)])
    pared.save(pared.fit(Words().eval(), conf, quiet=True), tmp_path)
    return tmp_path


def lost(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).square().sum() / expected.square().sum()).sqrt().item()


def test_a_model_runs_in_bfloat16_with_linear_weights_in_codes(place: Path) -> None:
    exact: Any = pared.load(place, model=Words())
    found: Any = pared.load(place, model=Words(), dtype=torch.bfloat16)
    held = {name for name, module in found.named_modules() if isinstance(module, Counterpart)}
    assert held == {"table", "up", "head"}
    assert found.head.pared_codes("weight") is found.table.pared_codes("weight")
    assert {found.wide.weight.dtype, found.mix.weight.dtype, found.norm.weight.dtype} == {torch.bfloat16}
    assert found.angles.dtype == torch.float32, "what is in no state dict keeps its type, as in transformers"
    with torch.no_grad():
        for ids in (IDS[:1, :3], IDS):
            out, expected = found(ids), exact(ids)
            assert out.dtype == torch.bfloat16
            assert lost(out, expected) < 2 * HALF_UNIT
            assert torch.equal(copy.deepcopy(found)(ids), out)
            again: Any = pickle.loads(pickle.dumps(found))
            assert torch.equal(again(ids), out)
    assert record_of(again).dtype == torch.bfloat16
    assert [line.name for line in found.pared.plan] == [line.name for line in exact.pared.plan]


def test_in_small_memory_weights_are_decoded_to_bfloat16(place: Path) -> None:
    small: Any = pared.load(place, model=Words(), memory="small", dtype=torch.bfloat16)
    floats: Any = pared.load(place, model=Words()).to(torch.bfloat16)
    floats.angles = small.angles
    assert small.up.pared_encoded
    with torch.no_grad():
        assert torch.equal(small(IDS), floats(IDS))


def test_gradients_flow_through_inputs(place: Path) -> None:
    found: Any = pared.load(place, model=Words(), dtype=torch.bfloat16)
    x = torch.randn(2, 32, dtype=torch.bfloat16, requires_grad=True)
    found.up(x).sum().backward()
    expected = found.up.weight.float().sum(0).expand(2, 32)
    assert x.grad is not None
    assert lost(x.grad, expected.double()) < 2 * HALF_UNIT


def test_layers_that_run_in_int8_go_on_to(tmp_path: Path) -> None:
    torch.manual_seed(0)
    conf = PostTrainingQuantConfig(approach="dynamic", quant_level=0)
    pared.save(pared.fit(nn.Sequential(nn.Linear(64, 48)).eval(), conf, quiet=True), tmp_path)
    int8: Any = pared.load(tmp_path, model=nn.Sequential(nn.Linear(64, 48)))
    found: Any = pared.load(tmp_path, model=nn.Sequential(nn.Linear(64, 48)), dtype=torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    assert found[0].pared_activation == int8[0].pared_activation
    assert found(x).dtype == torch.bfloat16
    assert lost(found(x), int8(x.float()).double()) < 2 * HALF_UNIT


def test_what_is_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype=torch.float16 is not None or torch.bfloat16"):
        pared.load(place, model=Words(), dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"dtype=torch.bfloat16 and engine='auto' exclude each other"):
        pared.load(place, model=Words(), dtype=torch.bfloat16, engine="auto")
