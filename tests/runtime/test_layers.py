"""Counterparts: every kind of layer that can run in int8, every way to be called, against its own float forward."""

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from pared.fitting.rounding.nearest import nearest
from pared.formats.activation import Activation
from pared.formats.coded import Coded
from pared.formats.views import view_of
from pared.runtime.layers.attention import leave_fast_paths, rejoin_fast_paths
from pared.runtime.layers.counterpart import Counterpart, restore, stand_in
from pared.runtime.layers.subclasses import class_below
from pared.runtime.layers.table import LAYERS, layer_of, weights_of
from tests.ratios import snr


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


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0))


def sequences() -> PackedSequence:
    """Of lengths 5, 7 and 2, in this order."""
    return nn.utils.rnn.pack_sequence([image(5, 12), image(7, 12), image(2, 12)], enforce_sorted=False)


def masked() -> tuple[Tensor, Tensor]:
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    return image(2, 6, 16), padding


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(33, 17), (image(5, 33),), {}),
    "linear in 4 dimensions": (lambda: nn.Linear(16, 8), (image(2, 3, 4, 16),), {}),
    "linear without bias, one row": (lambda: nn.Linear(24, 3, bias=False), (image(24),), {}),
    "linear subclass": (lambda: Halves(16, 8), (image(5, 16),), {}),
    "conv1d": (lambda: nn.Conv1d(6, 10, 5, stride=2, padding=2), (image(2, 6, 21),), {}),
    "conv1d unbatched": (lambda: nn.Conv1d(6, 10, 3), (image(6, 9),), {}),
    "conv1d same, even taps": (lambda: nn.Conv1d(4, 4, 4, padding="same"), (image(2, 4, 11),), {}),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), (image(2, 3, 9, 11),), {}),
    "conv2d groups": (lambda: nn.Conv2d(8, 12, 3, groups=4, bias=False), (image(1, 8, 7, 7),), {}),
    "conv2d depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (image(2, 16, 8, 8),), {}),
    "conv2d dilated, valid": (lambda: nn.Conv2d(4, 4, 3, dilation=2, padding="valid"), (image(1, 4, 9, 9),), {}),
    "conv2d reflecting": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (image(2, 4, 6, 6),), {}),
    "conv2d channels last": (
        lambda: nn.Conv2d(8, 8, 3, padding=1),
        (image(2, 8, 6, 6).to(memory_format=torch.channels_last),),
        {},
    ),
    "conv2d subclass": (lambda: SamePadded(3, 8, 4, stride=2), (image(2, 3, 12, 12),), {}),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 3, 2), padding=(0, 1, 1)), (image(1, 2, 3, 5, 5),), {}),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(6, 4, 5, stride=2, padding=1), (image(2, 6, 9),), {}),
    "transposed conv1d unbatched": (lambda: nn.ConvTranspose1d(6, 4, 4, bias=False), (image(6, 9),), {}),
    "transposed conv2d": (
        lambda: nn.ConvTranspose2d(8, 3, (4, 3), stride=(2, 3), padding=(1, 0), output_padding=1, dilation=(1, 2)),
        (image(2, 8, 5, 4),),
        {},
    ),
    "embedding": (lambda: nn.Embedding(50, 12, padding_idx=3), (torch.tensor([[1, 3, 49], [0, 3, 7]]),), {}),
    "embedding subclass": (lambda: Scaled(50, 12), (torch.tensor([5, 6]),), {}),
    "bags": (lambda: nn.EmbeddingBag(50, 12), (ids(3, 5),), {}),
    "bags with offsets": (
        lambda: nn.EmbeddingBag(50, 12, mode="max", padding_idx=-50),
        (torch.tensor([0, 4, 0, 9]), torch.tensor([0, 2, 2])),
        {},
    ),
    "weighted bags": (
        lambda: nn.EmbeddingBag(50, 12, mode="sum", include_last_offset=True),
        (ids(5), torch.tensor([0, 3, 5]), image(5)),
        {},
    ),
    "lstm": (lambda: nn.LSTM(12, 16, 2, bidirectional=True), (image(7, 3, 12),), {}),
    "lstm, batch first, with states": (
        lambda: nn.LSTM(12, 16, batch_first=True),
        (image(3, 7, 12), (image(1, 3, 16).tanh(), image(1, 3, 16))),
        {},
    ),
    "lstm, no batch, no bias": (lambda: nn.LSTM(12, 16, bias=False), (image(7, 12),), {}),
    "lstm, packed": (lambda: nn.LSTM(12, 16, bidirectional=True), (sequences(),), {}),
    "lstm, packed, with states": (
        lambda: nn.LSTM(12, 16),
        (sequences(), (image(1, 3, 16).tanh(), image(1, 3, 16))),
        {},
    ),
    "gru": (lambda: nn.GRU(12, 16, 2, bidirectional=True, batch_first=True), (image(3, 7, 12),), {}),
    "gru, packed, with a state": (lambda: nn.GRU(12, 16), (sequences(), image(1, 3, 16).tanh()), {}),
    "lstm cell": (lambda: nn.LSTMCell(12, 16), (image(3, 12),), {}),
    "lstm cell with states, no batch": (lambda: nn.LSTMCell(12, 16), (image(12), (image(16).tanh(), image(16))), {}),
    "gru cell": (lambda: nn.GRUCell(12, 16), (image(3, 12), image(3, 16).tanh()), {}),
    "rnn cell": (lambda: nn.RNNCell(12, 16, nonlinearity="relu"), (image(3, 12),), {}),
    "attention": (lambda: nn.MultiheadAttention(16, 4), (image(6, 2, 16), image(6, 2, 16), image(6, 2, 16)), {}),
    "self attention, masked": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        (*[masked()[0]] * 3,),
        {"key_padding_mask": masked()[1], "need_weights": False},
    ),
    "cross attention": (
        lambda: nn.MultiheadAttention(16, 4, kdim=8, vdim=12, bias=False, batch_first=True),
        (image(2, 5, 16), image(2, 7, 8), image(2, 7, 12)),
        {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(2), "average_attn_weights": False},
    ),
    "cross attention, one mask a head": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        (image(2, 5, 16), image(2, 7, 16), image(2, 7, 16)),
        {"attn_mask": image(8, 5, 7)},
    ),
}


def build(name: str, mode: str) -> tuple[nn.Module, nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The layer with the weights that the codes stand for, its counterpart, and what to call them with."""
    torch.manual_seed(0)
    make, args, kwargs = CASES[name]
    module = make().eval().requires_grad_(False)
    first = args[0].data
    low, high = (min(0.0, float(first.min())), float(first.max())) if mode == "static" else (0.0, 0.0)
    return module, counterpart_of(module, mode, low, high), args, kwargs


def counterpart_of(module: nn.Module, mode: str, low: float = 0.0, high: float = 0.0) -> nn.Module:
    """In int8; the module gets the weights that the codes stand for."""
    layer = layer_of(module)
    assert layer is not None
    held = [(module, weights_of(module))] + [(module.get_submodule(part), ("weight",)) for part in layer.children]
    coded = {(one, a): quantize(one, a) for one, attributes in held for a in attributes}
    counterpart = copy.deepcopy(module)
    stand_in(counterpart, {a: coded[module, a] for a in held[0][1]}, Activation(mode, low, high, held[0][1]))
    for part in layer.children:
        whole = {"weight": coded[module.get_submodule(part), "weight"]}
        stand_in(counterpart.get_submodule(part), whole, Activation("dynamic"))
    return counterpart


def quantize(module: nn.Module, attribute: str) -> Coded:
    """A weight in codes; the module gets what they stand for."""
    weight = module.get_parameter(attribute)
    coded = nearest(weight, 8, view_of(module, attribute, tuple(weight.shape)))
    weight.data.copy_(coded.decode())
    return coded


def modes(name: str) -> tuple[str, ...]:
    layer = layer_of(CASES[name][0]())
    assert layer is not None
    return layer.modes


def tensors(out: Any) -> list[Tensor]:
    """Its floats; of packed sequences too."""
    found = [one.data for one in tree_leaves(out) if isinstance(one, (Tensor, PackedSequence))]
    return [one for one in found if one.is_floating_point()]


# torch's own word on its float convolution.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

EVERY = [(name, mode) for name in CASES for mode in modes(name)]


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_the_output_is_that_of_the_float_layer(name: str, mode: str) -> None:
    layer, counterpart, args, kwargs = build(name, mode)
    pairs = list(zip(tensors(layer(*args, **kwargs)), tensors(counterpart(*args, **kwargs)), strict=True))
    for exact, quantized in pairs:
        assert quantized.shape == exact.shape
        assert quantized.dtype == exact.dtype
        assert quantized.is_contiguous() or quantized.stride() == exact.stride()
        assert snr(exact, quantized) > 30
        if mode == "gather":
            assert torch.allclose(exact, quantized, rtol=1e-6, atol=1e-7)
    if mode != "gather":
        assert not all(torch.equal(*pair) for pair in pairs), "the int8 kernel did not run"


@pytest.mark.parametrize("make", [lambda: nn.LSTM(12, 16, 2, bidirectional=True), lambda: nn.GRUCell(12, 16)])
@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1e6])
def test_weights_for_inputs_in_unusual_units_lose_nothing(make: Callable[[], nn.Module], scale: float) -> None:
    torch.manual_seed(0)
    module = make().eval().requires_grad_(False)
    for name in weights_of(module):
        if name.startswith("weight_ih") and "l1" not in name:
            module.get_parameter(name).mul_(scale)
    counterpart = counterpart_of(module, "dynamic")
    x = torch.randn(7, 3, 12)[-1 if isinstance(module, nn.GRUCell) else slice(None)] / scale
    assert snr(tensors(module(x))[0], tensors(counterpart(x))[0]) > 35


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_an_empty_batch(name: str, mode: str) -> None:
    layer, counterpart, args, kwargs = build(name, mode)
    if len(args) > 1 or not isinstance(args[0], Tensor) or args[0].dim() == 1 or "unbatched" in name or kwargs:
        pytest.skip("has no batch to empty, or more than one tensor has it")
    try:
        expected = layer(args[0][:0])
    except RuntimeError:
        pytest.skip("PyTorch takes no empty batch here either")
    for exact, quantized in zip(tensors(expected), tensors(counterpart(args[0][:0])), strict=True):
        assert quantized.shape == exact.shape


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_the_weight_reads_as_floats_and_the_class_stays(name: str, mode: str) -> None:
    layer, counterpart, args, kwargs = build(name, mode)
    assert isinstance(counterpart, type(layer))
    assert class_below(type(counterpart)) is type(layer)
    assert repr(counterpart) == repr(layer)
    for _ in range(2):
        for attribute in weights_of(layer):
            assert torch.equal(getattr(counterpart, attribute), getattr(layer, attribute))
        counterpart(*args, **kwargs)  # a handle must not outlive the forward


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_copies_and_pickles_pack_anew(name: str, mode: str) -> None:
    _, counterpart, args, kwargs = build(name, mode)
    expected = tensors(counterpart(*args, **kwargs))
    for clone in (copy.deepcopy(counterpart), pickle.loads(pickle.dumps(counterpart))):
        assert isinstance(clone, Counterpart)
        assert all(map(torch.equal, tensors(clone(*args, **kwargs)), expected))


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_without_an_activation_weights_are_decoded_as_they_are_read(name: str, mode: str) -> None:
    layer, counterpart, args, kwargs = build(name, mode)
    for module in counterpart.modules():
        if isinstance(module, Counterpart):
            module.pared_activation = None
    for exact, decoded in zip(tensors(layer(*args, **kwargs)), tensors(counterpart(*args, **kwargs)), strict=True):
        assert torch.equal(exact, decoded)


@pytest.mark.parametrize(("name", "mode"), [one for one in EVERY if one[1] != "gather"])
def test_in_bfloat16(name: str, mode: str) -> None:
    layer, counterpart, args, kwargs = build(name, mode)
    for module in counterpart.modules():
        if isinstance(module, Counterpart):
            module.pared_in_bfloat16 = True
    before = {name: tensor.clone() for name, tensor in counterpart.state_dict().items()}
    for exact, half in zip(tensors(layer(*args, **kwargs)), tensors(counterpart(*args, **kwargs)), strict=True):
        assert half.dtype == exact.dtype
        assert not torch.equal(exact, half)
        assert snr(exact, half) > 35
    after = counterpart.state_dict()
    assert all(after[name].dtype == one.dtype and torch.equal(after[name], one) for name, one in before.items())


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_the_float_module_comes_back_empty(name: str, mode: str) -> None:
    layer, counterpart, _, _ = build(name, mode)
    for module in counterpart.modules():
        if isinstance(module, Counterpart):
            restore(module)
    assert {n: (p.shape, p.dtype) for n, p in counterpart.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in layer.named_parameters()
    }
    assert list(counterpart.state_dict()) == list(layer.state_dict())
    assert not any(isinstance(module, Counterpart) for module in counterpart.modules())


@pytest.mark.parametrize(("name", "mode"), EVERY)
@pytest.mark.slow
def test_a_captured_graph_uses_decoded_floats(name: str, mode: str) -> None:
    layer, counterpart, args, kwargs = build(name, mode)
    if isinstance(args[0], PackedSequence):
        pytest.skip("PyTorch exports no packed sequences")
    exported = torch.export.export(counterpart, args, kwargs).module()
    for ours, exact in zip(tensors(exported(*args, **kwargs)), tensors(layer(*args, **kwargs)), strict=True):
        assert torch.allclose(ours, exact, atol=1e-5)


def test_inputs_in_half_precision() -> None:
    for name in ("linear", "conv2d"):
        layer, counterpart, (x,), _ = build(name, "static")
        half, counterpart = layer.bfloat16(), counterpart.bfloat16()
        out = counterpart(x.bfloat16())
        assert out.dtype == torch.bfloat16
        assert snr(half(x.bfloat16()).float(), out.float()) > 30


class Doubled(nn.LSTM):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]  # simpler than its base
        return super().forward(2 * x)


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(4, 4, max_norm=1.0),  # edits its table while reading it
        nn.EmbeddingBag(4, 4, max_norm=1.0),
        nn.ConvTranspose2d(2, 2, 2, groups=2),
        nn.ConvTranspose3d(2, 2, 2),
        nn.LSTM(2, 4, proj_size=2),
        nn.RNN(2, 2),
        Doubled(2, 2),
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.LayerNorm(4),
    ],
    ids=lambda module: repr(module)[:40],
)
def test_what_has_no_counterpart(module: nn.Module) -> None:
    assert weights_of(module) == ()


def test_a_state_dict_of_codes_goes_in_and_out() -> None:
    _, counterpart, (x,), _ = build("conv2d", "static")
    _, other, _, _ = build("conv2d", "static")
    state = counterpart.state_dict()
    assert list(state) == ["weight", "weight_step", "bias"]
    changed = {**state, "weight": -state["weight"]}
    other(x)
    other.load_state_dict(changed)
    assert torch.equal(other.weight, -counterpart.weight)
    assert not torch.equal(other(x), counterpart(x)), "the packed weight must follow"
    with pytest.raises(RuntimeError, match=r"weight: expected int8 codes \[8, 3, 3, 3\], found torch.float32"):
        other.load_state_dict({**state, "weight": torch.zeros(8, 3, 3, 3)})
    assert sorted(other.load_state_dict({}, strict=False).missing_keys) == ["bias", "weight", "weight_step"]


@pytest.mark.parametrize("make", [lambda: nn.LSTM(16, 16, 2, dropout=0.5), lambda: nn.MultiheadAttention(16, 2, 0.5)])
def test_dropout_in_training_is_the_layers_own(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = make().requires_grad_(False).train()
    counterpart = counterpart_of(layer, "dynamic")
    x = torch.randn(5, 2, 16)
    args = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    with torch.no_grad():
        one, other = (tensors(counterpart(*args))[0] for _ in range(2))
        assert not torch.equal(one, other)


def test_a_causal_hint_without_a_mask_is_an_error_as_in_pytorch() -> None:
    counterpart = counterpart_of(nn.MultiheadAttention(16, 2).eval().requires_grad_(False), "dynamic")
    x = torch.randn(5, 2, 16)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Need attn_mask"):
        counterpart(x, x, x, is_causal=True)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if LAYERS[layer].forward], ids=lambda one: one.__name__)
def test_a_forward_of_the_table_is_called_as_the_layers_own(layer: type[nn.Module]) -> None:
    forward = LAYERS[layer].forward
    assert forward is not None
    ours, own = (list(inspect.signature(one).parameters)[1:] for one in (forward, layer.forward))
    assert ours == own


@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_moves_and_casts_keep_codes_and_steps(name: str, mode: str) -> None:
    _, counterpart, args, kwargs = build(name, mode)
    expected = tensors(counterpart(*args, **kwargs))
    state = {key: one.clone() for key, one in counterpart.state_dict().items()}

    def fails(_: Tensor) -> Tensor:
        raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"):
        counterpart._apply(fails)
    assert all(map(torch.equal, tensors(counterpart.cpu()(*args, **kwargs)), expected))
    for dtype in (torch.float16, torch.float32):
        counterpart.to(dtype)
        for module in counterpart.modules():
            if isinstance(module, Counterpart):
                assert {getattr(module, one).dtype for one in module.pared_views} == {dtype}
                assert {module.pared_step(one).dtype for one in module.pared_views} == {torch.float32}
    moved = counterpart.state_dict()
    assert all(torch.equal(moved[key], one) for key, one in state.items() if "bias" not in key)
    counterpart.to("meta")
    assert all(one.is_meta for one in (*counterpart.parameters(), *counterpart.buffers()))


RECURRENT = [name for name in CASES if name.startswith(("lstm", "gru", "rnn"))]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", RECURRENT)
def test_what_is_not_finite_shows_in_the_output(name: str, bad: float) -> None:
    layer, counterpart, (x, *rest), _ = build(name, "dynamic")
    x = copy.deepcopy(x)
    x.data.flatten()[0] = bad
    for exact, ours in zip(tensors(layer(x, *rest)), tensors(counterpart(x, *rest)), strict=True):
        assert (ours.isnan() | torch.isclose(exact, ours, atol=0.1)).all()
        assert bool(exact.isfinite().all()) >= bool(ours.isfinite().all())


@pytest.mark.parametrize("make", [lambda: nn.LSTM(12, 16), lambda: nn.GRU(12, 16)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_loud_sample_does_not_drown_a_quiet_one(make: Callable[[], nn.Module], packed: bool) -> None:
    torch.manual_seed(0)
    layer = make().eval().requires_grad_(False)
    counterpart = counterpart_of(layer, "dynamic")
    for louder in (7.0, 1000.0):
        x: Any = torch.randn(9, 2, 12).clamp(-2, 2)
        x[:, 1] *= louder / 2
        x = nn.utils.rnn.pack_padded_sequence(x, [5, 9], enforce_sorted=False) if packed else x
        states = [tensors(one(x)[1])[0][:, 0] for one in (layer, counterpart)]
        assert snr(*states) > 30


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("packed", [False, True])
def test_a_loud_state_does_not_drown_a_quiet_one(make: type[Any], packed: bool) -> None:
    torch.manual_seed(0)
    layer = make(12, 16).eval().requires_grad_(False)
    counterpart = counterpart_of(layer, "dynamic")
    cell, pair = issubclass(make, nn.RNNCellBase), make in (nn.LSTM, nn.LSTMCell)
    if cell and packed:
        pytest.skip("cells take no packed sequences")
    state = torch.randn(2, 16).clamp(-0.9, 0.9)
    state[1] *= 1000
    state = state if cell else state[None]
    x: Any = torch.randn(2, 12).clamp(-2, 2) if cell else torch.randn(4, 2, 12).clamp(-2, 2)
    x = nn.utils.rnn.pack_padded_sequence(x, [4, 4]) if packed else x
    outputs = [tensors(one(x, (state, state) if pair else state))[0] for one in (layer, counterpart)]
    outputs = [one.reshape(-1, 2, 16)[:, 0] for one in outputs]
    assert snr(outputs[0], outputs[1]) > 30


# Each called with a batch in the first dimension.
ALONE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "linear": lambda one, x: one(x),
    "linear in 4 dimensions": lambda one, x: one(x),
    "conv1d": lambda one, x: one(x),
    "conv2d": lambda one, x: one(x),
    "conv2d depthwise": lambda one, x: one(x),
    "conv2d channels last": lambda one, x: one(x),
    "conv2d reflecting": lambda one, x: one(x),
    "conv3d": lambda one, x: one(x),
    "transposed conv1d": lambda one, x: one(x),
    "transposed conv2d": lambda one, x: one(x),
    "lstm": lambda one, x: one(x.transpose(0, 1))[0].transpose(0, 1),
    "gru": lambda one, x: one(x)[0],
    "lstm cell": lambda one, x: one(x)[0],
    "gru cell": lambda one, x: one(x),
    "rnn cell": lambda one, x: one(x),
    "attention": lambda one, x: one(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1),
    "self attention, masked": lambda one, x: one(x, x, x, need_weights=False)[0],
}


@pytest.mark.parametrize(("name", "mode"), [one for one in EVERY if one[0] in ALONE])
def test_no_sample_depends_on_who_else_is_in_the_batch(name: str, mode: str) -> None:
    layer, counterpart, (x, *_), _ = build(name, mode)
    shape = (3, 7, 12) if name == "lstm" else (2, 6, 16) if name == "attention" else tuple(x.shape)
    x = torch.randn((4, *shape[1:]), generator=torch.Generator().manual_seed(1))
    if mode == "dynamic":
        x[1], x[2] = 0.1 * x[1], 1e6 * x[2].abs()

    def run(one: nn.Module, given: Tensor) -> Tensor:
        found: Tensor = ALONE[name](one, given)
        return found

    whole = run(counterpart, x)
    for i, sample in enumerate(x):
        alone = run(counterpart, sample[None])[0]
        assert torch.allclose(whole[i], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))
    others = [0, 1, 3]
    for bad in (torch.nan, torch.inf, 1e6):
        spoilt = x.clone()
        spoilt[2].view(-1)[5] = bad
        found, expected = run(counterpart, spoilt), run(layer, spoilt)
        assert torch.allclose(found[others], whole[others], rtol=1e-5, atol=1e-5 * float(whole[others].abs().max()))
        assert not (found[2].isfinite() & ~expected[2].isfinite()).any(), "what is not finite is hidden"
        if mode == "static":
            assert torch.equal(found[2].isfinite(), expected[2].isfinite())


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_integers_are_refused_as_the_float_layer_refuses_them(make: type[Any]) -> None:
    counterpart = counterpart_of(make(8, 8).eval().requires_grad_(False), "dynamic")
    with pytest.raises((RuntimeError, ValueError), match="dtype"):
        counterpart(torch.ones(2, 8, dtype=torch.int64))


@pytest.mark.parametrize("name", RECURRENT)
def test_eight_threads_at_first_use_give_what_one_gives(name: str) -> None:
    _, counterpart, args, kwargs = build(name, "dynamic")
    expected = tensors(copy.deepcopy(counterpart)(*args, **kwargs))
    start = threading.Barrier(8)

    def call() -> list[Tensor]:
        start.wait()
        with torch.inference_mode():
            return tensors(counterpart(*args, **kwargs))

    engine = torch.backends.quantized.engine
    with ThreadPoolExecutor(8) as pool:
        found = [one.result() for one in [pool.submit(call) for _ in range(8)]]
    assert all(torch.equal(*pair) for one in found for pair in zip(one, expected, strict=True))
    assert torch.backends.quantized.engine == engine
    # What was packed in inference mode serves outside of it.
    assert all(map(torch.equal, tensors(counterpart(*args, **kwargs)), expected))


def test_inputs_of_any_nesting_get_gradients() -> None:
    class Sums(nn.Linear):
        def forward(self, given: list[Tensor]) -> Tensor:  # type: ignore[override]  # another signature
            return F.linear(given[0] + given[1], self.weight, self.bias)

    torch.manual_seed(0)
    layer = Sums(8, 8).requires_grad_(False)
    counterpart = counterpart_of(layer, "dynamic")
    x = torch.randn(3, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(counterpart([x, x]).sum(), [x])
    assert torch.allclose(gradient, 2 * layer.weight.sum(0).expand(3, 8), atol=1e-6)


# torch's own word on its decompositions.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_transformed_functions_use_decoded_floats() -> None:
    layer, counterpart, (x,), _ = build("linear", "dynamic")
    assert torch.allclose(torch.func.vmap(counterpart)(x), layer(x), atol=1e-5)
    ours: Any = torch.func.jvp(counterpart, (x,), (torch.ones_like(x),))[1]
    assert torch.allclose(ours, layer.weight.sum(1).expand_as(ours), atol=1e-5)


def test_a_weight_that_is_given_back_is_floats() -> None:
    class Open(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), {"weight": self.weight}

    counterpart = counterpart_of(Open(8, 8).requires_grad_(False), "dynamic")
    given = counterpart(torch.randn(2, 8))[1]["weight"]
    assert type(given) is Tensor
    assert torch.equal(given, counterpart.weight)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"attn_mask": torch.ones(5, 5, dtype=torch.int64)},
        {"attn_mask": torch.zeros(1, 5)},
        {"key_padding_mask": torch.zeros(1, 5, dtype=torch.bool)},
    ],
)
def test_masks_that_pytorch_refuses_are_refused(kwargs: dict[str, Tensor]) -> None:
    layer = nn.MultiheadAttention(16, 2, batch_first=True).eval().requires_grad_(False)
    counterpart, x = counterpart_of(layer, "dynamic"), torch.randn(2, 5, 16)
    for one in (layer, counterpart):
        with pytest.raises((AssertionError, RuntimeError)):
            one(x, x, x, **kwargs)


def test_an_encoder_gets_its_fast_path_back() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval().requires_grad_(False)
    model = nn.TransformerEncoder(layer, 1).eval()
    attention = model.layers[0].self_attn
    stand_in(attention, {"in_proj_weight": quantize(attention, "in_proj_weight")}, None)
    leave_fast_paths(model)
    leave_fast_paths(model)  # once more changes nothing
    assert (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu) == (False, 0)
    rejoin_fast_paths(model)
    assert (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu) == (True, 1)
