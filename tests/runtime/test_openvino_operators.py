"""Operators that OpenVINO's front end does not know as PyTorch has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import openvino
import pytest
import torch
from torch import Tensor, fx, nn

from pared.runtime.graphs.capturing.capture import FlatModel, exported
from pared.runtime.openvino.translation.operators import translated

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # warnings of torch about itself

CALLS: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "chunk": lambda x: x.chunk(2, dim=-1),
    "chunk, of fewer parts": lambda x: x.chunk(5, dim=2),
    "chunk of the first": lambda x: x.transpose(0, 2).chunk(2),
    "split": lambda x: x.split(3, dim=-1),
    "split by sizes": lambda x: x.split([1, 7], dim=2),
    "split by number": lambda x: x.tensor_split(3, dim=-1),
    "a whole slice": lambda x: [x[:, :, None, :], x[:, 0:], x[:, 1:]],
}


class Calls(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> list[Tensor]:
        return [one * (place + 1) for place, one in enumerate(CALLS[self.name](x))]


@pytest.mark.parametrize("name", CALLS)
def test_it_is_translated(name: str) -> None:
    model, x = Calls(name).eval(), torch.randn(2, 3, 8)
    program = exported(FlatModel(model, ((x,), {}), list), lambda rank: range(rank - 1))
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    compiled = openvino.Core().compile_model(translated(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = torch.randn(4, 5, 8)
    found = compiled([x.numpy()])
    for place, expected in enumerate(model(x)):
        assert torch.equal(torch.from_numpy(found[place]), expected)


def test_what_is_whole_is_no_slice() -> None:
    program = exported(FlatModel(Calls("a whole slice"), ((torch.randn(2, 3, 8),), {}), list), range)
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    kinds = [op.get_type_name() for op in translated(graph).get_ops()]
    assert kinds.count("Slice") == 1
