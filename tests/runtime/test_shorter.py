"""Several operators as one function give what they give, and are only joined where they are what they seem."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.runtime.graphs.call_kinds import arguments_of, bind, parameters_of
from pared.runtime.graphs.capturing.capture import capture
from pared.runtime.graphs.graph import Graph
from pared.runtime.graphs.shorter.heads import of_one_token
from pared.runtime.graphs.shorter.norms import rms_norm
from pared.runtime.graphs.shorter.rotation import rotated

EPS = 1e-5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Functional(nn.Module):
    """A model of one function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(random(8, seed=9), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y, self.weight)


def norm(x: Tensor, _y: Tensor, weight: Tensor) -> Tensor:
    x = x.to(torch.float32)
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)).to(torch.float32)


def turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotation(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    cosine, sine = (y[..., :1] * weight).cos(), (y[..., :1] * weight).sin()
    x = x * weight  # whose width is known
    return x * cosine + turned(x) * sine


def rotation_by(turn: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    x = x * weight
    return x * weight.cos() + turn(x) * weight.sin()


def attention(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    x, y = x.mean(1, keepdim=True) * weight, y * weight  # of one token, and of a known width
    keys = y[:, None].expand(-1, 2, -1, -1) * torch.tensor([1.0, 2.0])[:, None, None]
    wide = keys[:, :, None].expand(-1, 2, 3, -1, -1).reshape(len(y), 6, -1, 8)
    return F.scaled_dot_product_attention(x[:, None] * torch.arange(6)[:, None, None], wide, wide, scale=0.3)


JOINED: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "norm": (norm, rms_norm),
    "rotation": (rotation, rotated),
    "attention": (attention, of_one_token),
}
# What looks alike, and is something else.
OTHERS: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "a mean over places": (lambda x, _y, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS)), rms_norm),
    "of another input": (lambda x, y, w: w * (x * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)), rms_norm),
    "a third power": (lambda x, _y, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + EPS)), rms_norm),
    "one number for all": (lambda x, _y, w: w[:1] * (x * torch.rsqrt(x.pow(2).mean(-1, True) + EPS)), rms_norm),
    "the other half": (lambda x, _y, w: rotation_by(lambda x: torch.cat((x[..., 4:], -x[..., :4]), -1), x, w), rotated),
    "a third": (lambda x, _y, w: rotation_by(lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1), x, w), rotated),
    "two inputs": (lambda x, _y, w: rotation_by(lambda x: turned(x + 1), x, w), rotated),
}


def graph_of(function: Callable[..., Tensor], x: Tensor, y: Tensor) -> tuple[nn.Module, Graph, dict[str, Any]]:
    model = Functional(function).eval()
    bound = bind(parameters_of(model), (x, y), {})
    assert bound is not None
    return model, Graph(model, capture(model, arguments_of(bound))), bound


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", JOINED)
def test_joined_operators_give_what_they_gave(name: str, batch: int) -> None:
    function, joined = JOINED[name]
    model, graph, _ = graph_of(function, random(3, 1, 8), random(3, 5, 8, seed=1))
    assert any(node.target is joined for node in graph.module.graph.nodes)
    x, y = random(batch, 1, 8, seed=2), random(batch, 1 if name == "rotation" else 4, 8, seed=3)
    bound = bind(parameters_of(model), (x, y), {})
    assert bound is not None
    assert torch.allclose(graph(bound), model(x, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_alike_stays(name: str) -> None:
    function, joined = OTHERS[name]
    model, graph, bound = graph_of(function, random(3, 5, 8), random(3, 5, 8, seed=1))
    assert all(node.target is not joined for node in graph.module.graph.nodes)
    assert torch.allclose(graph(bound), model(bound["x"], bound["y"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", ["none", "floats", "booleans"])
def test_queries_of_one_token_read_the_keys_that_they_share(mask: str) -> None:
    query, key, value = random(2, 6, 1, 8), random(2, 2, 5, 8, seed=1), random(2, 2, 5, 8, seed=2)
    seen = torch.tensor([True, False, True, True, False]).expand(2, 1, 1, 5)
    given = {"none": None, "floats": torch.zeros(2, 1, 1, 5).masked_fill(~seen, -torch.inf), "booleans": seen}[mask]
    wide = [one.repeat_interleave(3, 1) for one in (key, value)]
    expected = F.scaled_dot_product_attention(query, wide[0], wide[1], attn_mask=given, scale=0.4)
    assert torch.allclose(of_one_token(query, key, value, given, 0.4), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_norm_of_zeros_and_of_what_is_not_finite(rows: int) -> None:
    weight, zeros = random(8), torch.zeros(rows, 8)
    assert torch.equal(rms_norm(zeros, weight, EPS), zeros)
    x = random(rows, 8)
    x[0, 3] = torch.nan
    assert rms_norm(x, weight, EPS)[0].isnan().all()
    assert rms_norm(x, weight, EPS)[1:].isfinite().all()
