"""Counterparts of layers, every kind and every way to be called, against their own float forward."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pared.runtime.layers.counterpart import Counterpart, restore
from pared.runtime.layers.subclasses import class_below
from pared.runtime.layers.table import LAYERS, weights_of
from tests.ratios import snr
from tests.runtime.counterparts import EVERY, build, counterpart_of, tensors

# torch's own word on its float convolution.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


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
