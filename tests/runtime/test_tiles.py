"""On machines with tiles: attention in bfloat16, filters of one tap as products; elsewhere nothing changes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.runtime.float_forms import outline_of
from pared.runtime.graphs.attention import as_floats, mask_to_bfloat16, to_bfloat16, to_float32
from pared.runtime.graphs.call_kinds import arguments_of
from pared.runtime.graphs.capturing.capture import capture
from pared.runtime.graphs.graph import Graph
from pared.runtime.graphs.products import QCONVS, QLINEAR
from pared.runtime.kernels import conv
from pared.runtime.kernels.activation import quantize
from pared.runtime.kernels.machine import available, extensions, has_tiles
from pared.runtime.kernels.patches import channels_first, patches_of
from tests.runtime import reference
from tests.runtime.inputs import SPAN, assert_same, random, random_codes, random_step
from tests.runtime.test_graphs import CASES, SIZES, Case, assembled, bound_of, graph_of, leaves, targets

pytestmark = pytest.mark.skipif(bool(available()), reason="no int8 kernels here")

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Mobile(nn.Module):
    """Filters of one tap between deep ones: expansion, projection, residual, norms of which some gains are negative."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.expand_norm = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.deep, self.deep_norm = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32)
        self.project, self.project_norm = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.last, self.out = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 8, 1)
        generator = torch.Generator().manual_seed(0)
        for norm in (self.expand_norm, self.deep_norm, self.project_norm):
            nn.init.normal_(norm.weight, generator=generator)
            nn.init.normal_(norm.bias, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self.expand_norm(self.expand(x)))
        wide = F.relu6(self.deep_norm(self.deep(wide)))
        x = x + self.project_norm(self.project(wide))
        mapped: Tensor = self.out(F.relu(self.last(x)))
        return mapped


MOBILE = Case(Mobile, lambda n, size: {"x": torch.randn(n, 16, size, 9, generator=torch.Generator().manual_seed(n))})


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("name", [*CASES, "mobile"])
@pytest.mark.slow
def test_a_graph_gives_what_the_modules_give(tiles: None, name: str, mode: str) -> None:
    case = MOBILE if name == "mobile" else CASES[name]
    _, q = assembled(case, mode)
    graph = graph_of(q, case.call(4, 24))
    with torch.no_grad():
        for n, size in SIZES:
            call = case.call(n, size)
            expected, found = q(**call), graph(bound_of(q, call))
            for ours, theirs in zip(leaves(found), leaves(expected), strict=True):
                assert ours.dtype == theirs.dtype
                assert ours.is_contiguous() == theirs.is_contiguous()
                assert (ours - theirs).square().sum() <= 2e-3 * theirs.square().sum()


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32], ids=str)
@pytest.mark.slow
def test_attention_runs_in_bfloat16_from_the_products_on(tiles: None, mask: torch.dtype | None) -> None:
    case = CASES["attention"]
    _, q = assembled(case)
    call: dict[str, Any] = case.call(4, 24)
    if mask is not None:
        keep = torch.rand(4, 1, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.8
        keep[..., 0] = True
        call["mask"] = keep if mask is torch.bool else torch.where(keep, 0.0, -1e4)
    graph = Graph(q, capture(outline_of(q), arguments_of(bound_of(q, call))))
    nodes = list(graph.module.graph.nodes)
    (attention,) = (node for node in nodes if node.target is SDPA)
    merged = next(node for node in nodes if node.target is QLINEAR)
    assert torch.bfloat16 in merged.args, "q, k and v come in bfloat16"
    to_half = [node.target for node in nodes if node.target in (to_bfloat16, mask_to_bfloat16)]
    assert to_half == {None: [], torch.bool: [to_bfloat16], torch.float32: [mask_to_bfloat16]}[mask]
    assert [user.target for user in attention.users] == [to_float32]
    assert sum(node.target is as_floats for node in nodes) == (mask is torch.bool)
    with torch.no_grad():
        expected = q(**call)["hidden"]
        assert (graph(bound_of(q, call))["hidden"] - expected).square().sum() <= 1e-4 * expected.square().sum()


@pytest.mark.slow
def test_a_number_far_below_zero_masks_no_less_and_no_more_than_it_does_in_float32(tiles: None) -> None:
    case = CASES["attention"]
    _, q = assembled(case)
    call: dict[str, Any] = case.call(4, 24)
    call["mask"] = torch.zeros(4, 1, 24, 24)
    call["mask"][2] = torch.finfo(torch.float32).min  # a sample of padding alone: every token counts the same
    call["mask"][3, ..., 5:] = -torch.inf
    graph = Graph(q, capture(outline_of(q), arguments_of(bound_of(q, call))))
    with torch.no_grad():
        expected, found = q(**call)["hidden"], graph(bound_of(q, call))["hidden"]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).square().sum() <= 1e-3 * theirs.square().sum()


def test_what_also_others_read_stays_in_float32(tiles: None) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).unflatten(-1, (4, 16)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q) + q

    case = Case(Own, lambda n, size: {"x": torch.randn(n, size, 64, generator=torch.Generator().manual_seed(n))})
    _, q = assembled(case)
    graph = graph_of(q, case.call(4, 24))
    assert torch.bfloat16 not in next(node for node in graph.module.graph.nodes if node.target is QLINEAR).args
    assert targets(graph).count(to_bfloat16) == 3


@pytest.mark.slow
def test_attention_of_other_types_is_left_alone(tiles: None) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            wide = x.double()
            attended: Tensor = self.last(F.scaled_dot_product_attention(wide, wide, wide).float())
            return attended

    case = Case(Wide, lambda n, size: {"x": torch.randn(n, 2, size, 16, generator=torch.Generator().manual_seed(n))})
    _, q = assembled(case)
    assert to_bfloat16 not in targets(graph_of(q, case.call(4, 24)))


@pytest.mark.slow
def test_filters_of_one_tap_join_as_convolutions_do(tiles: None, exact: None) -> None:
    _, q = assembled(MOBILE)
    graph = graph_of(q, MOBILE.call(4, 24))
    operators = targets(graph)
    assert operators.count(QLINEAR) == 4
    assert sum(one in QCONVS for one in operators) == 1
    aten = torch.ops.aten
    assert not {aten.batch_norm.default, aten.hardtanh.default, aten.relu.default, aten.relu6.default} & set(operators)
    assert operators.count(quantize) == 2, "of the input, and of the sum"
    # Behind the deep one, and of the two inputs; between the last two there are rows all the way.
    assert operators.count(patches_of) == 3
    assert operators.count(channels_first) == 3


@pytest.mark.slow
def test_elsewhere_they_are_convolutions() -> None:
    _, q = assembled(MOBILE)
    operators = targets(graph_of(q, MOBILE.call(4, 24)))
    assert QLINEAR not in operators
    assert sum(one in QCONVS for one in operators) == 5
    _, q = assembled(CASES["attention"])
    assert to_bfloat16 not in targets(graph_of(q, CASES["attention"].call(4, 24)))


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_products_of_pixels_equal_their_reference(tiles: None, dimensions: int, padding: int) -> None:
    taps, space = (1,) * dimensions, (7, 5, 4)[:dimensions]
    codes, step, bias = random_codes(6, 10, *taps), random_step(6), random(6, seed=3)
    geometry = conv.Geometry.of(taps, padding=padding)
    packed = conv.pack(codes, step, geometry)
    assert packed.taps == taps
    for batch in ((), (0,), (1,), (3,)):
        x = random(*batch, 10, *space)
        for fast, span in ((conv.static(x, packed, bias, SPAN), SPAN), (conv.dynamic(x, packed, bias), None)):
            slow = reference.convolution(x, codes, step, geometry, bias, span=span, levels=packed.levels)
            assert_same(fast, slow)
            assert fast.is_contiguous()


def test_steps_groups_and_distances_are_left_to_convolutions(tiles: None) -> None:
    codes, step = random_codes(6, 10, 1, 1), random_step(6)
    assert conv.pack(codes, step, conv.Geometry.of((1, 1))).taps
    assert not conv.pack(codes, step, conv.Geometry.of((1, 1), stride=2)).taps
    assert not conv.pack(codes, step, conv.Geometry.of((1, 1), groups=2)).taps
    assert not conv.pack(random_codes(6, 10, 3, 3), step, conv.Geometry.of((3, 3))).taps


def test_tiles_are_one_of_the_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert has_tiles()
    assert "amx_tile" in extensions()
    for limit, there in (("AVX512_CORE_VNNI", False), ("avx512_core_amx", True), ("default", True)):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert has_tiles() is there
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not has_tiles(), "a build that cannot say has none"
