"""Graphs that run in place of modules: they give what the modules give, and serve the calls that they were made for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.errors import ModelError
from pared.model.tensors import find_tensors
from pared.runtime import float_forms, quantized
from pared.runtime.graphs import fusion
from pared.runtime.graphs.call_kinds import Argument, arguments_of, bind, parameters_of
from pared.runtime.graphs.capturing.capture import capture
from pared.runtime.graphs.fusion import FLOAT_CONV
from pared.runtime.graphs.graph import Graph
from pared.runtime.graphs.merging import product_and_sum
from pared.runtime.graphs.products import QCONVS, QLINEAR
from pared.runtime.kernels.activation import quantize
from pared.runtime.kernels.conv import pad_codes
from pared.runtime.kernels.linear import product_of_rows
from pared.runtime.layers.dispatch import run_kernel
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.profile.timings import Timing
from pared.runtime.record import contents_of
from pared.runtime.serving.agreement import agree

GENERATOR = torch.Generator().manual_seed(0)


class Attention(nn.Module):
    """A transformer's layer: a shared input, an activation between two products, residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2000, 64)
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.norm, self.last = nn.LayerNorm(64), nn.LayerNorm(64)
        self.wide, self.narrow = nn.Linear(64, 256), nn.Linear(256, 64)
        with torch.no_grad():  # outliers in the inputs of q, k and v, of `wide` and of `narrow`
            self.table.weight[:, 5] *= 6
            self.norm.weight[3] *= 6
            self.wide.weight[9] *= 6

    def forward(self, ids: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.table(ids)
        q, k, v = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norm(x + self.o(attended))
        out = self.last(x + self.narrow(F.gelu(self.wide(x))))
        return {"hidden": out * scale, "pooled": out.mean(1)}


class Images(nn.Module):
    """Convolutions with all that may join them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16)
        self.deep, self.deep_norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.project = nn.Conv2d(16, 16, 1)
        self.long = nn.Conv2d(16, 8, (1, 3), padding="same")
        self.head = nn.Linear(8, 10)
        for norm in (self.stem_norm, self.deep_norm):
            nn.init.normal_(norm.weight, generator=GENERATOR)  # some gains are negative
            nn.init.normal_(norm.bias, generator=GENERATOR)
            norm.running_mean = torch.randn(16, generator=GENERATOR)
            norm.running_var = torch.rand(16, generator=GENERATOR) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem_norm(self.stem(F.pad(x, (0, 1, 0, 1)))))
        x = x + self.project(F.silu(self.deep_norm(self.deep(x))))
        x = F.relu(self.long(x))
        return self.head(x.mean((2, 3)))


class Sound(nn.Module):
    """One channel and long filters, and an operator that writes to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.next = nn.Conv1d(1, 32, 128, 16), nn.Conv1d(32, 16, 3, padding=1)
        self.up = nn.ConvTranspose1d(16, 8, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.next(self.patches(x).relu_())).tanh_()


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    call: Callable[[int, int], dict[str, Tensor]]


CASES = {
    "attention": Case(
        Attention,
        lambda n, size: {"ids": torch.randint(0, 2000, (n, size), generator=torch.Generator().manual_seed(size))},
    ),
    "images": Case(
        Images, lambda n, size: {"x": torch.randn(n, 3, 2 * size, size, generator=torch.Generator().manual_seed(n))}
    ),
    "sound": Case(
        Sound, lambda n, size: {"x": torch.randn(n, 1, 32 * size, generator=torch.Generator().manual_seed(n))}
    ),
}
SIZES = [(4, 24), (2, 17), (1, 24), (7, 24)]


def assembled(case: Case, mode: str = "static", kernel: str = "int8") -> tuple[nn.Module, nn.Module]:
    """The float model, and the quantized one with every layer on one kernel, whatever is fastest."""
    torch.manual_seed(0)
    model = case.model().eval()
    conf = PostTrainingQuantConfig(approach=mode, quant_level=0)
    return model, forced(model, pared.fit(model, conf, [case.call(4, 24)], quiet=True), kernel)


def forced(model: nn.Module, found: nn.Module, kernel: str) -> nn.Module:
    """The same quantized model with every layer on one kernel."""
    timing = Timing((1,), *(1.0 if kernel == one else 2.0 for one in ("float32", "bfloat16", "int8")))
    contents = contents_of(found)
    profile = Profile(this_machine(), dict.fromkeys(contents.activations, timing))
    return quantized.assemble(find_tensors(model), contents, profile)


def graph_of(model: nn.Module, call: dict[str, Any]) -> Graph:
    return Graph(model, capture(float_forms.outline_of(model), arguments_of(bound_of(model, call))))


def bound_of(model: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    found = bind(parameters_of(model), (), call)
    assert found is not None
    return found


def targets(graph: Graph) -> list[object]:
    return [node.target for node in graph.module.graph.nodes if node.op == "call_function"]


def leaves(value: Any) -> list[Tensor]:
    return list(value.values()) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("kernel", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_a_graph_gives_what_the_modules_give_at_every_size(name: str, mode: str, kernel: str) -> None:
    case = CASES[name]
    _, q = assembled(case, mode, kernel)
    graph = graph_of(q, case.call(4, 24))
    with torch.no_grad():
        for n, size in SIZES:
            call = case.call(n, size)
            expected, found = q(**call), graph(bound_of(q, call))
            assert type(found) is type(expected)
            for ours, theirs in zip(leaves(found), leaves(expected), strict=True):
                assert ours.shape == theirs.shape
                assert ours.is_contiguous() == theirs.is_contiguous()
                assert (ours - theirs).square().sum() <= 2e-3 * theirs.square().sum()


@pytest.mark.slow
def test_products_of_one_input_share_its_codes_and_gelu_gives_codes_at_once(exact: None) -> None:
    case = CASES["attention"]
    _, q = assembled(case)
    found = graph_of(q, case.call(4, 24))
    operators = targets(found)
    assert all(layer.pared_activation.outliers for layer in (q.q, q.wide, q.narrow))
    assert operators.count(QLINEAR) == 3, "one of q, k and v, and one more of the outliers that the narrow layer takes"
    assert operators.count(product_and_sum) == 2, "which add what went around the attention, and around the wide layer"
    assert torch.ops.aten.gelu.default not in operators
    quantizations = [one for one in operators if getattr(one, "__name__", "").startswith("quantize_contiguous")]
    assert len(quantizations) == 3, "q, k and v share one, and the narrow layer needs none"
    wide = next(node for node in found.module.graph.nodes if node.target is QLINEAR and torch.uint8 in node.args)
    assert "gelu" in wide.args
    with torch.no_grad():
        assert torch.equal(found(bound_of(q, case.call(4, 24)))["hidden"], q(**case.call(4, 24))["hidden"])


def test_dynamic_rows_are_rounded_once_for_all_that_multiply_them() -> None:
    case = CASES["attention"]
    _, q = assembled(case, "dynamic")
    operators = targets(graph_of(q, case.call(4, 24)))
    assert operators.count(product_of_rows) == 4, "one of q, k and v"
    assert sum(getattr(one, "__name__", "") == "rows_of" for one in operators) == 4


@pytest.mark.slow
def test_norms_activations_and_padding_join_convolutions() -> None:
    case = CASES["images"]
    _, q = assembled(case)
    operators = targets(graph_of(q, case.call(4, 24)))
    assert sum(one in QCONVS for one in operators) == 4
    for joined in (torch.ops.aten.batch_norm.default, torch.ops.aten.silu.default, torch.ops.aten.relu.default):
        assert joined not in operators
    assert torch.ops.aten.pad.default not in operators
    assert operators.count(pad_codes) >= 1
    assert operators.count(quantize) <= 4


def test_only_the_first_of_two_norms_goes_into_the_steps() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.BatchNorm2d(16)
            for norm in (self.one, self.two):
                nn.init.normal_(norm.weight, generator=GENERATOR)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(self.one(self.conv(x)))
            return out

    case = Case(Twice, CASES["images"].call)
    _, q = assembled(case)
    found = graph_of(q, case.call(4, 24))
    assert targets(found).count(torch.ops.aten.batch_norm.default) == 1
    with torch.no_grad():
        expected = q(**case.call(4, 24))
        assert (found(bound_of(q, case.call(4, 24))) - expected).square().sum() < 1e-6 * expected.square().sum()


@pytest.mark.slow
def test_float_convolutions_take_them_in_too() -> None:
    case = CASES["images"]
    _, q = assembled(case, kernel="float32")
    found = graph_of(q, case.call(4, 24))
    operators = targets(found)
    assert operators.count(FLOAT_CONV) >= 3
    assert torch.ops.aten.batch_norm.default not in operators
    assert torch.ops.aten.pad.default not in operators
    with torch.no_grad():
        floats = q(**case.call(4, 24))
        assert torch.allclose(found(bound_of(q, case.call(4, 24))), floats, atol=1e-5)


@pytest.mark.slow
def test_long_filters_of_one_channel_run_as_products_of_patches() -> None:
    case = CASES["sound"]
    _, q = assembled(case)
    operators = targets(graph_of(q, case.call(4, 24)))
    assert QLINEAR in operators
    assert run_kernel in operators, "the transposed convolution runs as its module does"


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.layer(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Branching, "torch.export cannot capture it"), (Counting, "changes buffers or inputs")],
)
def test_what_cannot_be_captured_says_why(model: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        capture(model().eval(), [Argument("x", "float32", (4, 8))])


class Nested(nn.Module):
    """A part called `model`, as in many models; and a bias that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.outer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.outer(self.model(x)), self.outer.weight, self.outer.bias * 2)


def test_products_belong_to_the_modules_that_make_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    model = Nested().eval()
    conf = PostTrainingQuantConfig(approach="static", quant_level=0)
    q = forced(model, pared.fit(model, conf, [x], quiet=True), "int8")
    found = graph_of(q, {"x": x})
    assert targets(found).count(QLINEAR) == 2, "the third is not made by the module that owns the weight"
    with torch.no_grad():
        assert torch.allclose(found({"x": x}), q(x), atol=1e-6)


@pytest.mark.slow
def test_a_build_without_an_operator_does_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["images"]
    _, q = assembled(case, kernel="float32")
    monkeypatch.setattr(fusion, "FLOAT_CONV", None)
    found = graph_of(q, case.call(4, 24))
    assert torch.ops.aten.conv2d.default in targets(found)
    with torch.no_grad():
        assert torch.allclose(found(bound_of(q, case.call(4, 24))), q(**case.call(4, 24)), atol=1e-5)


class Copying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.layer(x)
        return x.clone(), y, y.clone()


def test_copies_that_are_given_back_are_copies() -> None:
    q = pared.fit(Copying().eval(), PostTrainingQuantConfig(approach="static", quant_level=0), [torch.ones(4, 8)])
    x = torch.ones(4, 8)
    with torch.no_grad():
        mine, one, two = graph_of(q, {"x": x})({"x": x})
    assert len({tensor.data_ptr() for tensor in (x, mine, one, two)}) == 4


def test_outputs_agree_by_structure_and_energy() -> None:
    one = {"a": torch.tensor([1.0, float("nan")]), "b": torch.tensor([1, 2])}
    assert agree(one, {"a": torch.tensor([1.001, float("nan")]), "b": torch.tensor([1, 2])})
    assert not agree(one, {"a": one["a"], "b": torch.tensor([1, 3])})
    assert not agree(one, {"a": torch.tensor([1.0, 1.0]), "b": one["b"]})
    assert not agree(one, one["a"])
    assert not agree(torch.zeros(2), torch.zeros(2).double())
