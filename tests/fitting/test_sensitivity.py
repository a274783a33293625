"""What errors cost, predicted by gradients, is what noise and rounding do."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pared.fitting.calibration import blocks, observe, sensitivity
from pared.fitting.calibration.gathering.noise import LEVELS
from pared.fitting.calibration.sensitivity import Sensitivity, TensorStats
from pared.formats.activation import Activation
from pared.formats.views import view_of
from pared.model import calls
from pared.model.tensors import find_tensors
from tests.fitting.damage import damage, measured


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 12)
        self.lstm = nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 50)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.lstm(self.table(ids))[0])}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.depthwise(self.first(x).relu())
        return self.norm(self.up(h)), h


class Speller(nn.Module):
    """Returns tokens only, each of them a float's index."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.cell = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 20)

    def forward(self, token: Tensor) -> Tensor:
        hidden, said = None, []
        for _ in range(3):
            out, hidden = self.cell(self.table(token), hidden)
            token = self.head(out).argmax(-1)
            said.append(token)
        return torch.cat(said, 1)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


def ids(batch: int) -> Tensor:
    return torch.randint(0, 50, (batch, 9), generator=torch.Generator().manual_seed(batch))


CASES: list[tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = [(Convolutions, images), (Recurrent, ids)]


@pytest.mark.parametrize(("make", "batch"), CASES)
@pytest.mark.slow
def test_predicted_damage_is_what_noise_does(make: Callable[[], nn.Module], batch: Callable[[int], Tensor]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    batches = [batch(n) for n in range(20, 44)]
    found = measured(model, batches)
    for model_tensor in find_tensors(model):
        if not model_tensor.fits_grid:
            continue
        size = 1e-3 * float(model_tensor.tensor.detach().square().mean().sqrt())
        costs = []
        for seed in range(6):
            noisy = copy.deepcopy(model)
            noise = torch.randn(model_tensor.tensor.shape, generator=torch.Generator().manual_seed(seed)) * size
            noisy.get_parameter(model_tensor.name).data += noise
            costs.append(damage(model, noisy, batches))
        predicted = float(found.tensors[model_tensor.name].rows.sum()) * size**2
        assert predicted == pytest.approx(sum(costs) / len(costs), rel=0.35), model_tensor.name


@pytest.mark.parametrize(("make", "batch"), CASES)
def test_the_model_is_as_it_was(make: Callable[[], nn.Module], batch: Callable[[int], Tensor]) -> None:
    torch.manual_seed(0)
    model = make()
    next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    measured(model, [batch(4)])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_the_same_seed_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    one, same, other = (measured(model, [ids(8)], seed).tensors["head.weight"].rows for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_moments_lie_in_blocks_of_the_weight() -> None:
    torch.manual_seed(0)
    found = measured(Convolutions(), [images(4), images(5)]).tensors
    for name, shape in {"first.weight": (1, 27, 27), "depthwise.weight": (16, 9, 9), "up.weight": (1, 64, 64)}.items():
        one = found[name]
        assert one.moments is not None
        assert one.unseen is not None
        assert one.moments.shape == shape
        assert torch.allclose(one.moments, one.moments.transpose(1, 2), rtol=1e-4)
        assert torch.linalg.eigvalsh(one.moments.double()).min() > -1e-6 * one.moments.max()
        assert torch.linalg.eigvalsh((one.moments - one.unseen).double()).min() > -1e-6 * one.moments.max()
        assert float(one.moments.diagonal(dim1=1, dim2=2).sum()) == pytest.approx(float(one.rows.sum()), rel=1e-4)
    assert found["first.bias"].moments is None


def test_wide_weights_have_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "WIDEST_BLOCK", 10)
    torch.manual_seed(0)
    found = measured(nn.Linear(36, 4), [torch.randn(8, 36)]).tensors["weight"]
    assert found.moments is not None
    assert (found.layout.column_blocks, found.moments.shape) == (4, (4, 9, 9))
    odd = measured(nn.Linear(37, 4), [torch.randn(8, 37)]).tensors["weight"]
    assert odd.moments is not None
    assert (odd.layout.column_blocks, odd.moments.shape) == (4, (4, 10, 10))


def test_rows_of_a_table_are_counted() -> None:
    torch.manual_seed(0)
    batches = [ids(6), ids(7)]
    found = measured(Recurrent(), batches).tensors["table.weight"]
    expected = torch.bincount(torch.cat([b.reshape(-1) for b in batches]), minlength=50).double()
    assert found.uses is not None
    assert torch.equal(found.uses, expected)
    assert found.moments is None
    assert torch.equal(found.rows > 0, expected > 0)


def test_a_tied_table_has_moments_too() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 12)
            self.head = nn.Linear(12, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x).tanh())

    torch.manual_seed(0)
    assert measured(Tied(), [ids(6)]).tensors["table.weight"].moments is not None


def test_tokens_are_stood_in_for_by_the_last_products() -> None:
    torch.manual_seed(0)
    token = torch.randint(0, 20, (32, 1))
    found = measured(Speller(), [token]).tensors
    assert all(float(found[name].rows.sum()) > 0 for name in ("head.weight", "cell.weight_hh_l0", "table.weight"))


def test_a_model_without_weights_has_nothing_to_measure() -> None:
    found = sensitivity.measure(find_tensors(nn.ReLU()), [calls.Call((torch.zeros(1),), {})], [1.0], 0)
    assert found is not None
    assert found.tensors == {}


def test_an_unused_weight_is_not_heard_of() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    assert set(measured(Partly(), [torch.randn(4, 4)]).tensors) == {"used.weight", "used.bias"}


def test_no_graph_is_kept() -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            kept.append(weakref.ref(out))
            return out

    gc.disable()
    try:
        found = measured(nn.Sequential(nn.Linear(4, 4), Spy(4, 4), nn.Tanh()), [torch.randn(3, 4), torch.randn(3, 4)])
        assert found.tensors
        assert len(kept) > 2
        assert all(one() is None for one in kept), "freed at once, not by the garbage collector"
    finally:
        gc.enable()


def test_a_brief_look_says_the_same_of_rows_and_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    seen = observe.collect(model, [torch.randn(64, 32) for _ in range(16)], 10**9)
    whole = sensitivity.measure(find_tensors(model), seen.calls, seen.energies, 0)
    some = seen.some(256)
    brief = sensitivity.measure(find_tensors(model), some.calls, some.energies, 0, rounds=1)
    assert whole is not None
    assert brief is not None
    for name, found in brief.tensors.items():
        assert found.moments is None
        assert float(found.rows.sum()) == pytest.approx(float(whole.tensors[name].rows.sum()), rel=0.5)
    for name, noise in brief.inputs.items():
        assert noise.total == pytest.approx(whole.inputs[name].total, rel=0.5)
        assert noise.dynamic == pytest.approx(whole.inputs[name].dynamic, rel=0.5)


def quantized_input(model: nn.Linear, x: Tensor, activation: Activation) -> float:
    """What rounding the input in this way does to the output, as a share of its energy."""
    if activation.mode == "static":
        step = torch.tensor((activation.high - activation.low) / LEVELS)
        rounded = (x.clamp(activation.low, activation.high) / step).round() * step
    else:
        step = (x.amax(1, keepdim=True).clamp(min=0) - x.amin(1, keepdim=True).clamp(max=0)) / LEVELS
        rounded = (x / step).round() * step
    with torch.no_grad():
        exact, out = model(x), model(rounded)
        return float((out - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_predicted_damage_of_inputs_is_what_rounding_does(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(32, 16)
    x = torch.randn(4096, 32)
    noise = measured(model, [x]).inputs["weight"]
    ends = (float(x.min()), float(x.max()))
    activation = Activation("static", *ends) if mode == "static" else Activation("dynamic")
    assert noise.cost(activation) == pytest.approx(quantized_input(model, x, activation), rel=0.3)


def test_views_say_which_rows_there_are() -> None:
    torch.manual_seed(0)
    model = Convolutions()
    found = measured(model, [images(4)]).tensors
    for model_tensor in find_tensors(model):
        if model_tensor.weight_like:
            view = view_of(model_tensor.module, model_tensor.attribute, tuple(model_tensor.tensor.shape))
            assert found[model_tensor.name].rows.shape == (view.n_rows,)


@pytest.mark.parametrize("known", [{}, {"weight": TensorStats(torch.zeros(4, dtype=torch.float64))}])
def test_what_has_no_known_cost_can_be_corrected(known: dict[str, TensorStats]) -> None:
    found = Sensitivity(known).corrected(find_tensors(nn.Linear(8, 4, bias=False)), {"weight": 8.0})
    assert found.tensors["weight"].rows.tolist() == [2.0] * 4


def test_what_is_known_is_corrected_by_the_factor() -> None:
    known = {"weight": TensorStats(torch.arange(4, dtype=torch.float64))}
    found = Sensitivity(known).corrected(find_tensors(nn.Linear(8, 4, bias=False)), {"weight": 8.0})
    assert found.tensors["weight"].rows.tolist() == [0.0, 8.0, 16.0, 24.0]
