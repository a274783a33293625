"""Counterparts: every kind of layer that can run in int8, every way to be called, against its own float forward."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.layers import LAYERS, Activation, Counterpart, float_class, is_candidate, stand_in
from pared.solvers import nearest
from pared.views import view_of


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 3.0 * super().forward(ids)


class Halves(nn.Linear):
    """Uses its weight in two products and in an operation that no kernel knows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + x @ self.weight.t().abs().mean(1, keepdim=True)


class SamePadded(nn.Conv2d):
    """Pads its input itself, unevenly, as TensorFlow does and EfficientNet with it."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 1, 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(33, 17), image(5, 33)),
    "linear in 4 dimensions": (lambda: nn.Linear(16, 8), image(2, 3, 4, 16)),
    "linear without bias, one row": (lambda: nn.Linear(24, 3, bias=False), image(24)),
    "linear subclass": (lambda: Halves(16, 8), image(5, 16)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 5, stride=2, padding=2), image(2, 6, 21)),
    "conv1d unbatched": (lambda: nn.Conv1d(6, 10, 3), image(6, 9)),
    "conv1d same, even taps": (lambda: nn.Conv1d(4, 4, 4, padding="same"), image(2, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), image(2, 3, 9, 11)),
    "conv2d groups": (lambda: nn.Conv2d(8, 12, 3, groups=4, bias=False), image(1, 8, 7, 7)),
    "conv2d depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), image(2, 16, 8, 8)),
    "conv2d dilated, valid": (lambda: nn.Conv2d(4, 4, 3, dilation=2, padding="valid"), image(1, 4, 9, 9)),
    "conv2d reflecting": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), image(2, 4, 6, 6)),
    "conv2d channels last": (
        lambda: nn.Conv2d(8, 8, 3, padding=1),
        image(2, 8, 6, 6).to(memory_format=torch.channels_last),
    ),
    "conv2d subclass": (lambda: SamePadded(3, 8, 4, stride=2), image(2, 3, 12, 12)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 3, 2), padding=(0, 1, 1)), image(1, 2, 3, 5, 5)),
    "embedding": (lambda: nn.Embedding(50, 12, padding_idx=3), torch.tensor([[1, 3, 49], [0, 3, 7]])),
    "embedding subclass": (lambda: Scaled(50, 12), torch.tensor([5, 6])),
}


def build(name: str, mode: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The layer with the weight that the codes stand for, its counterpart, and an input."""
    torch.manual_seed(0)
    make, x = CASES[name]
    layer = make().eval().requires_grad_(False)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    coded = nearest(weight, 8, view_of(layer, "weight", tuple(weight.shape)))
    layer.weight.data = coded.decode()
    counterpart = copy.deepcopy(layer)
    low, high = (min(0.0, float(x.min())), float(x.max())) if mode == "static" else (0.0, 0.0)
    stand_in(counterpart, coded, Activation(mode, low, high))
    return layer, counterpart, x


def modes(name: str) -> tuple[str, ...]:
    module = CASES[name][0]()
    return next(modes for cls, modes in LAYERS.items() if isinstance(module, cls))


# torch's own word on its float convolution.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

EVERY = [(name, mode) for name in CASES for mode in modes(name)]


def snr(exact: Tensor, other: Tensor) -> float:
    return float(10 * torch.log10(exact.square().sum() / (exact - other).square().sum().clamp(min=1e-30)))


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_the_output_is_that_of_the_float_layer(name: str, mode: str) -> None:
    layer, counterpart, x = build(name, mode)
    assert is_candidate(layer)
    exact, quantized = layer(x), counterpart(x)
    assert quantized.shape == exact.shape
    assert quantized.dtype == exact.dtype
    assert snr(exact, quantized) > 33
    if mode == "gather":
        assert torch.equal(exact, quantized)
    else:
        assert not torch.equal(exact, quantized), "the int8 kernel did not run"


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_an_empty_batch(name: str, mode: str) -> None:
    layer, counterpart, x = build(name, mode)
    if x.dim() == 1 or name == "conv1d unbatched":
        pytest.skip("has no batch")  # the only cases without one
    assert counterpart(x[:0]).shape == layer(x[:0]).shape


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_the_weight_reads_as_floats_and_the_class_stays(name: str, mode: str) -> None:
    layer, counterpart, x = build(name, mode)
    assert isinstance(counterpart, type(layer))
    assert float_class(type(counterpart)) is type(layer)
    assert repr(counterpart) == repr(layer)
    assert torch.equal(counterpart.weight, layer.weight)
    counterpart(x)
    assert torch.equal(counterpart.weight, layer.weight), "a handle must not outlive the forward"


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_copies_and_pickles_pack_anew(name: str, mode: str) -> None:
    _, counterpart, x = build(name, mode)
    expected = counterpart(x)
    for clone in (copy.deepcopy(counterpart), pickle.loads(pickle.dumps(counterpart))):
        assert isinstance(clone, Counterpart)
        assert torch.equal(clone(x), expected)


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_a_captured_graph_uses_decoded_floats(name: str, mode: str) -> None:
    layer, counterpart, x = build(name, mode)
    exported = torch.export.export(counterpart, (x,)).module()
    assert torch.allclose(exported(x), layer(x), atol=1e-5)


def test_inputs_in_half_precision() -> None:
    for name in ("linear", "conv2d"):
        layer, counterpart, x = build(name, "static")
        half, counterpart = layer.bfloat16(), counterpart.bfloat16()
        out = counterpart(x.bfloat16())
        assert out.dtype == torch.bfloat16
        assert snr(half(x.bfloat16()).float(), out.float()) > 30


def test_what_is_no_candidate() -> None:
    assert not is_candidate(nn.Embedding(4, 4, max_norm=1.0))  # edits its table while reading it
    assert not is_candidate(nn.ConvTranspose2d(2, 2, 2))
    assert not is_candidate(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    assert not is_candidate(nn.LSTM(2, 2))


def test_a_state_dict_of_codes_goes_in_and_out() -> None:
    _, counterpart, x = build("conv2d", "static")
    _, other, _ = build("conv2d", "static")
    state = counterpart.state_dict()
    assert list(state) == ["weight", "weight_step", "bias"]
    changed = {**state, "weight": -state["weight"]}
    other(x)
    other.load_state_dict(changed)
    assert torch.equal(other.weight, -counterpart.weight)
    assert not torch.equal(other(x), counterpart(x)), "the packed weight must follow"
    with pytest.raises(RuntimeError, match=r"weight: expected int8 codes \[8, 3, 3, 3\], found nothing"):
        other.load_state_dict({"bias": state["bias"]})
