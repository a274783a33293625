"""Models, and their graphs in OpenVINO."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pared.runtime.graphs.call_kinds import arguments_of, bind, parameters_of
from pared.runtime.graphs.capturing.capture import capture
from pared.runtime.openvino.graph import OpenVinoGraph
from tests.runtime.exports import CASES


class Padded(nn.Module):
    """What a convolution takes is padded by an operator of its own; the columns are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, stride=2)
        self.side = nn.Conv2d(16, 24, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(nn.functional.pad(x, (1, 1, 1, 1))).relu()
        out: Tensor = self.second(nn.functional.pad(y, (0, 1, 0, 1))) + self.side(y)
        return out


class Outlying(nn.Module):
    """Two columns of the second layer's input are far larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> dict[str, Any]:
        scale = torch.ones(128)
        scale[5], scale[9] = 40.0, 30.0
        return {"out": self.second(torch.tanh(self.first(x)) * scale), "kind": "outlying", "same": x}


class Widened(Outlying):
    """The same between two products, so that the first can compute the columns again."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.first.weight[5] *= 40
            self.first.weight[9] *= 30

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"out": self.second(nn.functional.gelu(self.first(x))), "kind": "widened", "same": x}


class Shifted(Widened):
    """The same without a bias; a number is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first.register_parameter("bias", None)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"out": self.second(nn.functional.gelu(self.first(x) + 0.5)), "kind": "shifted", "same": x}


MODELS = CASES | {
    "widened": (Widened, (6, 64)),
    "shifted": (Shifted, (6, 64)),
    "padded": (Padded, (2, 3, 12, 12)),
    "outliers": (Outlying, (6, 64)),
}


def made(q: nn.Module, model: nn.Module, *args: Tensor) -> tuple[OpenVinoGraph, tuple[str, ...]]:
    names = parameters_of(model)
    bound = bind(names, args, {})
    assert bound is not None
    return OpenVinoGraph(q, capture(copy.deepcopy(model), arguments_of(bound))), names
