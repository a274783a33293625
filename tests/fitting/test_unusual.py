"""Models that do unusual things, and things that users do to models: nothing goes wrong in silence."""

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared import ModelError, PostTrainingQuantConfig
from pared.runtime.layers.counterpart import Counterpart
from tests.ratios import snr


class Referring(nn.Linear):
    """Holds its weight in a list as well."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.listed = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.listed[0], self.bias)


class Active(nn.Linear):
    """Has attributes and methods with names that a counterpart might want."""

    def __init__(self) -> None:
        super().__init__(32, 32)
        self.activation = "relu"
        self.step = 3

    def decode(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.activation == "relu" and self.step == 3 else x

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(super().forward(x))


class Pair(nn.Linear):
    """Is called with two arguments, and returns two things."""

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:  # type: ignore[override]  # on purpose
        return scale * super().forward(x), None


class Counting(nn.Module):
    """Writes a buffer in its forward."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.register_buffer("mean", torch.zeros(2, 32))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + 0.1 * x.detach().mean(0)
        out: Tensor = self.layer(x) - self.mean[0]
        return out


def fast(model: nn.Module, *batches: object, approach: str = "dynamic") -> nn.Module:
    """The model with everything in int8 that can be: nothing is timed without calibration."""
    return pared.fit(model, PostTrainingQuantConfig(approach=approach))


def test_a_weight_that_a_list_holds_too_stays_in_float() -> None:
    model, x = Referring(), torch.randn(4, 64)
    with torch.no_grad():
        assert snr(model(x), fast(model)(x)) > 30


def test_names_of_a_subclass_are_its_own() -> None:
    model, x = Active(), torch.randn(64, 32)
    q = fast(model)
    with torch.no_grad():
        assert q(x).min() == 0
        assert snr(model(x), q(x)) > 30
    assert q.activation == "relu"


def test_a_subclass_that_is_called_in_its_own_way_is_left_in_float() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.pair(x, 2.0)[0]
            return out

    q = pared.fit(Around(), PostTrainingQuantConfig(approach="static"), [torch.randn(8, 32)])
    assert {line.kernel for line in q.plan} == {"float"}


def test_a_buffer_may_change() -> None:
    q = fast(Counting())
    q(torch.randn(8, 32))
    state = q.state_dict()
    assert state["mean"].abs().sum() > 0
    assert torch.equal(state["mean"], q.mean)
    assert torch.equal(pickle.loads(pickle.dumps(q)).mean, q.mean)


def test_a_root_linear_in_int8_pickles() -> None:
    q, x = fast(nn.Linear(64, 64)), torch.randn(4, 64)
    assert isinstance(q, Counterpart)
    assert torch.equal(pickle.loads(pickle.dumps(q))(x), q(x))


@pytest.mark.slow
def test_a_model_goes_to_another_process() -> None:
    q, x = fast(nn.Sequential(nn.Linear(64, 64))), torch.randn(4, 64)
    # An executor says that its process broke; a pool would start another one and wait without end.
    with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
        assert torch.equal(pool.submit(call, q, x).result(timeout=120), q(x))


def call(model: nn.Module, x: Tensor) -> Tensor:
    """What the other process does."""
    out: Tensor = model(x).detach()
    return out


def test_functions_of_the_user_cannot_change_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = model[0].weight.detach().clone()

    def calibrate(own: nn.Module) -> None:
        own(torch.randn(2, 8))
        own[0].weight.data.mul_(2)

    def score(own: nn.Module) -> float:
        own.double()
        return 1.0

    pared.fit(model, None, calibrate, score)
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, before)


def test_integers_are_refused_as_the_float_layer_refuses_them() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        fast(nn.Linear(4, 4))(torch.ones(1, 4, dtype=torch.int64))


def test_a_quantized_model_is_not_compressed_again(tmp_path: Path) -> None:
    q = fast(nn.Sequential(nn.Linear(8, 8)))
    for model in (q, nn.Sequential(q), q[0]):
        with pytest.raises(ModelError, match="is already quantized"):
            pared.fit(model)
    with pytest.raises(ModelError, match="is already quantized"):
        pared.load(pared.save(q, tmp_path), model=q)


@pytest.mark.parametrize("change", ["add", "remove", "exchange"])
def test_an_edited_model_is_not_saved(change: str, tmp_path: Path) -> None:
    q = fast(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert isinstance(q, nn.Sequential)
    if change == "add":
        q.append(nn.Linear(8, 8))
    elif change == "remove":
        del q[1]
    else:
        q[1] = nn.Linear(8, 8, bias=False)
    with pytest.raises(ModelError, match="was added to the model, or removed from it, after it was compressed"):
        pared.save(q, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_layout_of_the_skeleton_is_kept(tmp_path: Path) -> None:
    model = nn.Conv2d(8, 16, 3)
    model.weight.data = model.weight.data.to(memory_format=torch.channels_last)
    q = pared.fit(model)
    loaded = pared.load(pared.save(q, tmp_path), model=model)
    assert loaded.weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(1, 8, 9, 9)
    assert torch.equal(loaded(x), q(x))


@pytest.mark.parametrize("is_part", [False, True])
def test_a_traced_model_is_one_like_any_other(is_part: bool, tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)))
        return nn.Sequential(traced, nn.Linear(16, 4)).eval() if is_part else traced.eval()

    x = torch.randn(8, 16)
    for approach in ("static", "weight_only"):
        q = pared.fit(make(), PostTrainingQuantConfig(quant_level=0, approach=approach), [x], quiet=True)
        pared.save(q, tmp_path)
        torch.save(q, tmp_path / "q.pt")
        with torch.no_grad():
            expected = q(x)
            copies = [copy.deepcopy(q), copy.copy(q), pared.load(tmp_path, model=make())]
            copies += [torch.load(tmp_path / "q.pt", weights_only=False)]
            for one in copies:
                assert torch.equal(one(x), expected)
        assert ((make()(x) - expected).norm() / expected.norm()).item() < 0.05
