"""Joined products give what the modules give, whatever stands beside them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig
from pared.model.tensors import find_tensors
from pared.runtime import float_forms, quantized
from pared.runtime.graphs.call_kinds import arguments_of, bind, parameters_of
from pared.runtime.graphs.capturing.capture import capture
from pared.runtime.graphs.graph import Graph
from pared.runtime.graphs.merging import product_and_sum
from pared.runtime.graphs.products import QLINEAR
from pared.runtime.kernels import linear, machine
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.record import contents_of


class Adapted(nn.Module):
    """A product, and beside it one of lower rank whose middle has outliers."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.base, self.down, self.up = (nn.Linear(64, 64, bias=bias) for _ in range(3))
        with torch.no_grad():
            self.down.weight[9] *= 30

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        with torch.no_grad():
            self.first.weight[9] *= 30

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


class Heads(nn.Module):
    """Two outputs of one input, one of them with a bias; and a sum that is broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(64, 48), nn.Linear(64, 32, bias=False)
        self.shift = nn.Parameter(torch.randn(1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.other(x) + self.shift


class Masked(nn.Module):
    """Attention with a mask that the model holds, and with queries that it has learned."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.queries = nn.Parameter(torch.randn(1, 8, 64))
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        own = F.scaled_dot_product_attention(h, h, h, attn_mask=self.mask)
        learned = self.queries.expand(x.shape[0], -1, -1)
        return own + F.scaled_dot_product_attention(learned, h, h, attn_mask=self.mask)


class Picking(nn.Module):
    """How many rows there are depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.shift = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.layer(x[mask]) + self.shift.view(1, 64)
        return out


class Sums(nn.Module):
    """Products that are added to what nobody needs any more, and to what is still needed: as it is, or as a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth, self.fifth = (nn.Linear(64, 64) for _ in range(5))
        self.norm, self.other = nn.LayerNorm(64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        given = x + self.first(x)
        spent = self.norm(given)
        read = spent + self.second(spent)
        kept = self.other(read)
        sums = self.third(kept) + kept
        view = sums.transpose(0, 1)
        return sums + self.fourth(sums) + view.transpose(0, 1), x.flip(0).t().t() + self.fifth(x.flip(0)) + kept


class Late(nn.Module):
    """What is added is read once more, later; and a product is added to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.norm, self.other = nn.LayerNorm(64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        read = self.norm(x)
        total = read + self.first(read)
        twice = self.second(x)
        return total, self.other(read), twice + twice


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]]]] = {
    "adapted": (lambda: Adapted(bias=False), lambda n: {"x": random(n, 64)}),
    "adapted with biases": (lambda: Adapted(bias=True), lambda n: {"x": random(n, 64)}),
    "chain": (Chain, lambda n: {"x": random(n, 64)}),
    "heads": (Heads, lambda n: {"x": random(n, 64)}),
    "sums": (Sums, lambda n: {"x": random(n, 64)}),
    "late": (Late, lambda n: {"x": random(n, 64)}),
    "masked": (Masked, lambda n: {"x": random(n, 8, 64)}),
    "picking": (Picking, lambda n: {"x": random(n, 64), "mask": torch.arange(n) % 3 == 0}),
}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def made(name: str) -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    """The quantized model, all layers in int8, and its calls."""
    torch.manual_seed(0)
    make, call = MODELS[name]
    model = make().eval()
    conf = PostTrainingQuantConfig(approach="static", quant_level=0)
    found = pared.fit(model, conf, [call(64)], quiet=True)
    return quantized.assemble(find_tensors(model), contents_of(found), Profile(this_machine())), call


def graph_of(model: nn.Module, call: dict[str, Tensor]) -> tuple[Graph, Callable[[dict[str, Tensor]], Any]]:
    names = parameters_of(model)

    def bound(call: dict[str, Tensor]) -> dict[str, Any]:
        found = bind(names, (), call)
        assert found is not None
        return found

    graph = Graph(model, capture(float_forms.outline_of(model), arguments_of(bound(call))))
    return graph, lambda call: graph(bound(call))


def lost(found: Any, expected: Any) -> float:
    ours, theirs = (one if isinstance(one, tuple) else (one,) for one in (found, expected))
    noise = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True))
    return noise / sum(float(b.square().sum()) for b in theirs)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_gives_what_the_modules_give(name: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exact:  # seven bits for activations, as on processors without VNNI
        monkeypatch.setattr(machine, "exact_products", lambda: False)
    q, call = made(name)
    _, run = graph_of(q, call(64))
    with torch.no_grad():
        for n in (64, 1, 5):
            given = call(n)
            kept = {key: one.clone() for key, one in given.items()}
            expected = q(**given)
            assert lost(run(given), expected) < 1e-9
            assert all(torch.equal(given[key], one) for key, one in kept.items())


def test_products_of_one_input_are_merged_once_for_all_graphs() -> None:
    q, call = made("heads")
    graphs = [graph_of(q, call(64))[0] for _ in range(2)]
    packs = []
    for graph in graphs:
        products = [node for node in graph.module.graph.nodes if node.target is QLINEAR]
        assert len(products) == 1
        packs.append(getattr(graph.module, str(products[0].args[3].target)))
    assert packs[0] is packs[1]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("sums", ["add", "sum", "add", "add", "add"]),  # an input; spent; needed later, as a view, not contiguous
        ("late", ["add"]),  # read later
        ("adapted", ["sum"]),  # another product
    ],
)
def test_a_sum_takes_the_memory_of_what_is_read_for_the_last_time(name: str, how: list[str], exact: None) -> None:
    q, call = made(name)
    graph, _ = graph_of(q, call(64))
    assert [node.args[-1] for node in graph.module.graph.nodes if node.target is product_and_sum] == how


@pytest.mark.parametrize("how", ["sum", "add"])
def test_products_and_sums_equal_their_reference(how: str) -> None:
    codes = torch.randint(-127, 128, (24, 16), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = linear.pack(codes, torch.full((24,), 0.01))
    for leading in ((5,), (1,), (2, 3), (1, 1)):
        x = torch.randint(0, packed.levels + 1, (*leading, 16), generator=torch.Generator().manual_seed(1))
        x = x.to(torch.uint8)
        wide = random(*leading, 96)
        others = [wide[..., :24].contiguous()] if how == "sum" else [wide[..., :24], wide.flip(-1)[..., ::4]]
        for other in others:
            given, bias = other.clone(), torch.ones(24)
            expected = F.linear((x.double() - 3) * 0.5, codes.double() * 0.01) + 1 + other.double()
            product = (x, 0.5, 3, packed.weight, packed.step, packed.zeros, bias)
            found = product_and_sum(*product, other, how)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(other, found if how == "sum" else given)
    with pytest.raises(RuntimeError, match="are added to"):
        product_and_sum(*product, torch.zeros(1, 24), how)


def test_outputs_are_no_parts_of_each_other() -> None:
    q, call = made("heads")
    _, run = graph_of(q, call(64))
    with torch.no_grad():
        one, other = run(call(1))
    assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    one *= nn.Parameter(torch.ones(()))  # refused for a view that was made without gradients


def test_masks_are_float32_whatever_the_default_is() -> None:
    q, call = made("masked")
    given = call(64)
    _, run = graph_of(q, given)
    with torch.no_grad():
        expected = q(**given)
        try:
            torch.set_default_dtype(torch.float64)
            assert lost(run(given), expected) < 1e-9
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_rule_that_fails_costs_the_graph_and_not_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("val")

    q, call = made("chain")
    monkeypatch.setattr("pared.runtime.graphs.graph.fuse", broken)
    with pytest.raises(pared.ModelError, match="its graph cannot be made"):
        graph_of(q, call(64))
