"""A graph is made once: nothing that making it or copying the model does counts as a change of its weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pared
from pared.runtime.graphs.call_kinds import arguments_of, bind, parameters_of
from pared.runtime.profile.profile import Profile, this_machine
from pared.runtime.profile.timings import CallTiming, ModelTiming
from pared.runtime.quantized import assemble
from pared.runtime.record import contents_of
from pared.runtime.serving import graph_server
from tests.runtime.exports import fitted


class Trains(nn.Module):
    """A class with a `train` of its own, as every model of transformers has, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(500, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
        self.register_buffer("offset", torch.ones(8))

    def train(self, mode: bool = True) -> Any:
        return super().train(mode)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.layers(ids) + self.offset
        return out


class Caches(Trains):
    """It also keeps what it computes of a weight, until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.table = None
        return super().train(mode)

    def forward(self, ids: Tensor) -> Tensor:
        if self.table is None:
            self.table = self.layers[1].weight.sum() * 1e-3
        return super().forward(ids) + self.table


def served(model: nn.Module, x: Tensor) -> nn.Module:
    q = fitted(model, "static", [x])
    bound = bind(parameters_of(model), (x,), {})
    assert bound is not None
    timing = ModelTiming((CallTiming(arguments_of(bound), 10.0, None, 9.0, 1.0),))
    tensors = pared.model.tensors.find_tensors(pared.runtime.float_forms.skeleton_of(q))
    return assemble(tensors, contents_of(q), Profile(this_machine(), model=timing))


@pytest.mark.parametrize("copied", [False, True])
def test_a_graph_is_made_once(copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Trains().eval(), torch.randint(0, 500, (16, 7))
    q = served(model, x)
    q = copy.deepcopy(q) if copied else q
    made: list[object] = []
    own = graph_server._CheckedGraph.__init__

    def counted(self: Any, *args: Any) -> None:
        made.append(args)
        own(self, *args)

    monkeypatch.setattr(graph_server._CheckedGraph, "__init__", counted)
    with torch.no_grad():
        for rows in (16, 5, 16, 3):
            q(x[:rows])
    assert len(made) == 1


@pytest.mark.parametrize("cls", [Trains, Caches])
def test_copies_write_to_no_tensor_of_the_model(cls: type[Trains]) -> None:
    torch.manual_seed(0)
    model, x = cls().eval(), torch.randint(0, 500, (16, 7))
    with torch.no_grad():
        model(x)
    q = served(model, x)
    with torch.no_grad():
        expected = q(x)
    tensors = {name: (one, one._version) for name, one in (*q.named_parameters(), *q.named_buffers())}
    copies = [copy.deepcopy(q), pared.runtime.float_forms.outline_of(q)]
    assert all(one._version == version for one, version in tensors.values())
    with torch.no_grad():
        torch.testing.assert_close(copies[0](x), expected)
