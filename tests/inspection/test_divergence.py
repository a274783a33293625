"""Where two models part: the layer that was damaged is the one that is named, and nothing is left behind."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import pared
from pared import PostTrainingQuantConfig


def images() -> nn.Module:
    """A network as for MNIST."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3), nn.ReLU(inplace=True), nn.Flatten()),
        *(nn.Linear(16 * 11 * 11, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10)),
    )


def words() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.Sequential(nn.Embedding(50, 32), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))


class Speech(nn.Module):
    """Recurrent layers, a cell that is called at each step, and a dictionary for an output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 24, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(48, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        y, (hidden, _) = self.lstm(x)
        state = y.new_zeros(len(x), 16)
        for step in y.unbind(1):
            state = self.cell(step * scale, state)
        return {"scores": self.head(state), "hidden": hidden, "length": 3}


def vectors(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape) for _ in range(3)]


Case = tuple[Callable[[], nn.Module], Callable[[], list[Any]], str, str]
CASES: dict[str, Case] = {
    "convolution": (images, lambda: vectors(4, 1, 28, 28), "4", "weight"),
    "linear": (images, lambda: vectors(4, 1, 28, 28), "7", "weight"),
    "norm": (images, lambda: vectors(4, 1, 28, 28), "1", "weight"),
    "attention": (words, lambda: [torch.arange(40).reshape(4, 10)], "1.layers.1.self_attn", "in_proj_weight"),
    "feed forward": (words, lambda: [torch.arange(40).reshape(4, 10)], "1.layers.2.linear1", "weight"),
    "embedding": (words, lambda: [torch.arange(40).reshape(4, 10)], "0", "weight"),
    "recurrent": (Speech, lambda: vectors(4, 6, 12), "lstm", "weight_hh_l0"),
    "cell": (Speech, lambda: [{"x": x, "scale": 0.5} for x in vectors(4, 6, 12)], "cell", "weight_ih"),
    "head": (Speech, lambda: vectors(4, 6, 12), "head", "weight"),
}


def made(case: str) -> tuple[nn.Module, list[Any], str, str]:
    torch.manual_seed(0)
    make, batches, name, attribute = CASES[case]
    return make().eval(), batches(), name, attribute


def damage(model: nn.Module, name: str, attribute: str) -> nn.Module:
    other = copy.deepcopy(model)
    weight = other.get_submodule(name).get_parameter(attribute)
    with torch.no_grad():
        weight.add_(weight.std() * torch.randn(weight.shape) if weight.dim() > 1 else torch.randn(weight.shape))
    return other


@pytest.mark.parametrize("case", CASES)
def test_the_damaged_layer_is_named(case: str) -> None:
    model, batches, name, attribute = made(case)
    found = pared.compare(model, damage(model, name, attribute), batches)
    assert found.diverges_at == name
    (layer,) = (layer for layer in found.layers if layer.name == name)
    assert layer.similarity is not None
    assert not layer.similarity.same
    before = found.layers[: found.layers.index(layer)]
    assert all(one.similarity is not None and one.similarity.same for one in before)
    assert found.pairs[0].name == f"{name}.{attribute}"
    assert "diverges here" in found.render()
    assert found.parts == found.to_json()["parts"] == found.to_json()["diverges_at"] == name


@pytest.mark.parametrize("case", ["linear", "feed forward", "recurrent"])
@pytest.mark.parametrize("approach", ["weight_only", "dynamic"])
def test_the_damaged_layer_is_named_between_quantized_models(case: str, approach: str) -> None:
    model, batches, name, attribute = made(case)
    conf = PostTrainingQuantConfig(approach=approach, quant_level=0)
    q = pared.fit(damage(model, name, attribute), conf, batches)
    assert pared.compare(model, q, batches).diverges_at == name


@pytest.mark.parametrize("case", ["linear", "attention", "cell"])
def test_a_quantized_model_is_followed_by_the_same_names(case: str) -> None:
    model, batches, *_ = made(case)
    q = pared.fit(model, PostTrainingQuantConfig(approach="dynamic", quant_level=0), batches)
    found = pared.compare(model, q, batches)
    assert found.outputs is not None
    assert found.outputs.sqnr > 20
    assert {layer.name for layer in found.layers} <= {name for name, _ in model.named_modules()}
    assert found.layers[-1].name == ""
    assert all(layer.similarity is not None for layer in found.layers)


def test_rows_are_in_the_order_in_which_modules_finish_and_count_their_calls() -> None:
    model, batches, *_ = made("cell")
    found = pared.compare(model, model, batches)
    assert [(layer.name, layer.calls) for layer in found.layers] == [("lstm", 3), ("cell", 18), ("head", 3), ("", 3)]
    assert found.outputs is not None
    assert found.outputs.same
    assert found.diverges_at is None
    assert "nowhere" in found.render()


def test_the_figures_of_a_layer_are_those_of_its_outputs() -> None:
    model, batches, name, attribute = made("linear")
    other = damage(model, name, attribute)
    found = pared.compare(model, other, batches)
    head = next(layer for layer in found.layers if layer.name == "7")
    outputs = [torch.cat([m[:8](x) for x in batches]).detach().double() for m in (model, other)]
    expected = 10 * torch.log10(outputs[0].square().sum() / (outputs[1] - outputs[0]).square().sum())
    assert head.similarity is not None
    assert head.similarity.sqnr == pytest.approx(float(expected), abs=1e-3)
    whole = [torch.cat([m(x) for x in batches]).detach().double() for m in (model, other)]
    assert found.outputs is not None
    assert found.outputs.error == pytest.approx(float((whole[1] - whole[0]).abs().max()), rel=1e-6)
    assert found.outputs.cosine == pytest.approx(
        float(torch.cosine_similarity(whole[0].flatten(), whole[1].flatten(), 0))
    )


def test_a_function_calls_the_model_as_it_likes() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=60, n_positions=32, bos_token_id=0, eos_token_id=0)
    model: Any = GPT2LMHeadModel(config).eval()  # type: ignore[no-untyped-call]  # transformers
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight.mul_(-1)

    def generate(one: Any) -> None:
        one.generate(torch.arange(1, 7).reshape(1, 6), max_new_tokens=4, do_sample=False)

    found = pared.compare(model, other, generate)
    assert found.diverges_at == "transformer.h.1.mlp.c_fc"
    assert found.layers[-1].calls == 4
    assert pared.compare(model, copy.deepcopy(model), generate).outputs.same


class Doubled(nn.Module):
    """Two modules that differ in what stands between their parts."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["two"](self.inner["one"](x)) * self.factor


def test_a_module_whose_parts_are_sound_is_named_itself() -> None:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(8, 8), Doubled(1.0), nn.Linear(8, 8))
    b = copy.deepcopy(a)
    b[1].factor = 3.0  # type: ignore[assignment]  # a Doubled
    assert pared.compare(a, b, vectors(4, 8)).diverges_at == "1"


def test_wrapped_models_are_followed() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Any:
            return self.module(x)

    model, batches, name, attribute = made("linear")
    assert pared.compare(model, Wrapper(damage(model, name, attribute)), batches).diverges_at == name


def test_outputs_of_another_shape_are_where_models_part() -> None:
    a = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Flatten(0))
    b = nn.Sequential(copy.deepcopy(a[0]), nn.Linear(8, 5), nn.Flatten(0))
    found = pared.compare(a, b, vectors(4, 8))
    assert found.diverges_at == "1"
    assert "returns [4, 6] in A, [4, 5] in B" in found.render()


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) + random.random() + float(np.random.rand())  # as models do


def test_both_draw_the_same_random_numbers_and_none_is_missing_afterwards() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Noisy(), nn.Dropout(0.5))
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    x = [torch.ones(4, 8)]
    assert pared.compare(model, copy.deepcopy(model), x).outputs.same
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of order")


@pytest.mark.parametrize("failing", ["neither", "A", "B"])
def test_models_are_left_as_they_were(failing: str) -> None:
    model, batches, *_ = made("convolution")
    broken = nn.Sequential(*copy.deepcopy(model)[:-1], Failing())
    a, b = (broken if failing == mark else copy.deepcopy(model) for mark in "AB")
    a.train()
    b[1].eval()
    before = [[m.training for m in one.modules()] for one in (a, b)]
    state = copy.deepcopy(a.state_dict())
    own = a.register_forward_hook(lambda *_: None)
    if failing == "A":
        with pytest.raises(pared.CalibrationError, match="inputs: batch 0: the model raised RuntimeError: out"):
            pared.compare(a, b, batches)
    elif failing == "B":
        with pytest.raises(pared.ModelError, match="compare: B, a Sequential: raised RuntimeError where the first"):
            pared.compare(a, b, batches)
    else:
        pared.compare(a, b, batches)
    assert before == [[m.training for m in one.modules()] for one in (a, b)]
    assert (hooks_of(a), hooks_of(b)) == (1, 0)
    assert all(torch.equal(state[name], tensor) for name, tensor in a.state_dict().items())
    own.remove()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "inputs: the calibration data are empty"),
        (torch.ones(2, 8), "inputs: expected an iterable of batches or a callable, got Tensor"),
        ([torch.ones(2, 3)], "inputs: batch 0: the model raised RuntimeError"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Any, message: str) -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(pared.CalibrationError, match=message):
        pared.compare(model, model, inputs)


def test_large_outputs_are_sampled_and_the_models_outputs_are_not() -> None:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(64, 2048), nn.ReLU())
    b = copy.deepcopy(a)
    with torch.no_grad():
        b[0].weight.add_(0.01 * torch.randn(2048, 64))
    x = torch.randn(100, 64)
    found = pared.compare(a, b, [x])
    layer = found.layers[0]
    assert layer.similarity is not None
    assert found.outputs is not None
    assert layer.similarity.count == 1 << 16
    assert found.outputs.count == 100 * 2048
    one, other = (m[0](x).detach().double() for m in (a, b))
    expected = float(10 * torch.log10(one.square().sum() / (other - one).square().sum()))
    assert layer.similarity.sqnr == pytest.approx(expected, abs=0.2)
