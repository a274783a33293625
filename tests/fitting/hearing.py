"""A model with parts that are called by themselves, and times as a profile has them."""

import torch
from torch import Tensor, nn

from pared.model.calls import Call
from pared.runtime.graphs.call_kinds import Argument
from pared.runtime.profile.timings import CallTiming, ModelTiming

CALL = (Argument("x", "float32", (4, 64)),)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))

    def forward(self, x: Tensor) -> Tensor:
        encoded: Tensor = self.layers(x)
        return encoded


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.small = Encoder(), nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 64)

    def forward(self, x: Tensor, said: Tensor) -> Tensor:
        answer: Tensor = self.decoder(self.encoder(x) + said) + self.small(said)
        return answer


class Hearing(nn.Module):
    """What hears and answers: a caller may keep what was heard for several answers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, x: Tensor, said: Tensor) -> Tensor:
        answer: Tensor = self.body(x, said)
        return answer


def model() -> Hearing:
    torch.manual_seed(0)
    return Hearing().eval()


def call() -> Call:
    generator = torch.Generator().manual_seed(1)
    return Call((torch.randn(4, 64, generator=generator),), {"said": torch.randn(4, 64, generator=generator)})


def timing(float32: float, bfloat16: float | None, modules: float, graph: float | None) -> ModelTiming:
    return ModelTiming((CallTiming(CALL, float32, bfloat16, modules, graph),))


GRAPH, HALF, FLOAT = timing(4.0, None, 3.0, 1.0), timing(4.0, 1.0, 3.0, 2.0), timing(1.0, 2.0, 3.0, 2.0)
