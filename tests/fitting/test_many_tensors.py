"""Models of very many small tensors: what decides is done for all at once, and gives what one by one would."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pared
from pared import allocate
from pared.allocate import Options
from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding.importance import make_target
from pared.fitting.search.free.on_grids import trace_tensor
from pared.fitting.timing import forms
from pared.formats import entropy
from pared.formats.views import View
from pared.model.tensors import find_tensors


def random_tensors(count: int) -> list[Options]:
    """Options of one to nine each, in whole numbers, so that many are equally good."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 10, count)
    return [Options(*(rng.integers(0, 6, n).astype(np.float64) for _ in range(2))) for n in sizes]


@pytest.mark.parametrize("price", [0.0, 0.5, 1.0, 3.0])
def test_a_price_decides_each_tensor_as_if_it_were_alone(price: float) -> None:
    tensors = random_tensors(200)
    for tensor, option in zip(tensors, allocate.choose(tensors, price).options, strict=True):
        cost = tensor.damage + price * tensor.nbytes
        assert option == int(np.lexsort((tensor.nbytes, cost))[0])


def test_what_is_left_goes_where_it_saves_most() -> None:
    tensors = random_tensors(50)
    start = allocate.choose(tensors, 100.0)
    full = allocate.fill(tensors, start, start.nbytes + 20)
    assert start.nbytes <= full.nbytes <= start.nbytes + 20
    assert full.damage < start.damage
    left = start.nbytes + 20 - full.nbytes
    for tensor, option in zip(tensors, full.options, strict=True):  # nothing that fits saves more
        fits = tensor.nbytes - tensor.nbytes[option] <= left
        assert not (fits & (tensor.damage < tensor.damage[option])).any()


def test_no_tensors_are_no_choice() -> None:
    assert allocate.choose([], 1.0) == allocate.Choice(1.0, (), 0.0, 0.0)
    assert allocate.fill([], allocate.choose([], 1.0), 100.0).options == ()


def test_the_steps_of_several_options_are_those_of_each() -> None:
    target = make_target(torch.randn(5, 64), View((5, 64), (0,)), TensorStats(torch.arange(1.0, 6.0).double()))
    common = torch.tensor([[-40], [-3], [0], [17]])
    for several, one in zip(target.steps(common, "int8"), common.flatten().tolist(), strict=True):
        assert torch.equal(several, target.steps(one, "int8"))


def test_entropy_of_few_and_of_many_codes() -> None:
    codes = np.random.default_rng(0).integers(-300, 300, 1000).astype(np.int16)
    assert entropy.entropy(codes) == pytest.approx(entropy.entropy(np.tile(codes, 2)), abs=1e-12)
    assert entropy.entropy(np.zeros(0, np.int16)) == 0


def test_a_few_numbers_are_floats_at_once() -> None:
    """On a grid the index alone takes more bytes than they do as float16."""
    tensor = next(iter(find_tensors(nn.Linear(4, 3, bias=False))))
    free = trace_tensor(tensor, TensorStats(torch.ones(3, dtype=torch.float64)))
    assert free.options.nbytes.tolist()[0] == 24
    assert free.decision(0).treatment == "float16"
    strict = trace_tensor(tensor, TensorStats(torch.ones(3, dtype=torch.float64)), strict=True)
    assert strict.decision(0).treatment == "grid"


class Many(nn.Module):
    """A list of tiny weights."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(2, 2)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x + 0.1 * (x @ weight)
        return x


def test_no_graph_of_very_many_tensors_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_MOST_TENSORS", 30)
    nothing: Any = None  # neither a server nor a call is looked at
    reason = forms.Forms(Many(40), *(nothing,) * 5)._as_graph(*(nothing,) * 6)
    assert reason == "to capture one of a model of 40 tensors would take too long"


@pytest.mark.slow
def test_many_tensors_come_back(tmp_path: Path) -> None:
    x = torch.randn(8, 2)
    q = pared.fit(Many(40), calib_dataloader=[x, x], quiet=True)
    q.save(tmp_path)
    assert torch.equal(pared.load(tmp_path, Many(40))(x), q(x))
