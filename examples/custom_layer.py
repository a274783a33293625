"""A layer of your own, registered with pared: a factorised weight with normalised columns, used through functions.

`python -m examples.custom_layer` compresses a network of such layers and shows what became of each weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared import PostTrainingQuantConfig

_WIDTH, _RANK, _CLASSES = 512, 192, 10


class LowRank(nn.Module):
    """`x -> gain * (x @ down) @ up.T + bias`, where the columns of `down` have length 1.

    Args:
        inputs: how many.
        outputs: how many.
        rank: the weight's rank.
    """

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(F.normalize(torch.randn(inputs, rank), dim=0))  # an input a row, unlike nn.Linear
        self.up = nn.Parameter(torch.randn(outputs, rank) * (2 / rank) ** 0.5)
        self.gain = nn.Parameter(torch.ones(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """From (..., inputs) to (..., outputs)."""
        weight = self.up @ F.normalize(self.down, dim=0).t()
        return self.gain * F.linear(x, weight) + self.bias


def in_int8(layer: LowRank, x: Tensor) -> Tensor:
    """The same in two products: the layer multiplies its factors first, which would need floats."""
    narrow = x @ F.normalize(layer.down, dim=0)  # a normalised weight is made of floats
    return layer.gain * F.linear(narrow, layer.up) + layer.bias  # `up` stays in codes


def register() -> None:
    """The three things that pared cannot know: where outputs are, what may stay in codes, and how to run on codes."""
    pared.register(LowRank, rows={"down": 1}, int8=["up"], forward=in_int8)


def load() -> nn.Module:
    """A classifier of random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [LowRank(_WIDTH, _WIDTH, _RANK), nn.ReLU(), LowRank(_WIDTH, _WIDTH, _RANK), nn.ReLU()]
        return nn.Sequential(*layers, LowRank(_WIDTH, _CLASSES, _CLASSES)).eval()


def calibration() -> list[Tensor]:
    """Eight batches (32, 512) of correlated inputs."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(_WIDTH, _WIDTH, generator=generator) / _WIDTH**0.5
    return [torch.randn(32, _WIDTH, generator=generator) @ mix for _ in range(8)]


def compress() -> tuple[nn.Module, nn.Module]:
    """The network and its quantized form."""
    register()
    model = load()
    return model, pared.fit(model, PostTrainingQuantConfig(quant_level=0), calibration())


def main() -> None:
    """Show the report, and the error of the output."""
    model, quantized = compress()
    print(pared.report(quantized))
    x = calibration()[0]
    with torch.no_grad():
        exact, ours = model(x), quantized(x)
    print(
        f"share of the output's energy that is lost: {float((ours - exact).square().sum() / exact.square().sum()):.2g}"
    )


if __name__ == "__main__":
    main()
