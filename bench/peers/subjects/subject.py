"""What the bench of peers knows of a model: its graphs, what calibrates it, what is timed, what judges it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[..., tuple[Tensor, ...]]  # a part in any engine: tensors to tensors


@dataclass(frozen=True)
class Part:
    """A part of a model that is one graph, for tools that want graphs.

    Args:
        module: takes tensors by position and gives a tensor or several.
        inputs, outputs: their names.
        calls: of calibration; the first has more than one of everything that varies.
        singles: the same samples one by one and without padding, where that differs.
        dynamic: the dimensions that vary, by input.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    calls: Sequence[tuple[Tensor, ...]]
    dynamic: Mapping[str, Mapping[int, str]]
    singles: Sequence[tuple[Tensor, ...]] = ()


@dataclass(frozen=True)
class Judgement:
    """Args:
    score: the model's own metric.
    fidelity: distance or likeness to FP32.
    """

    score: float
    fidelity: float


@dataclass(frozen=True)
class Subject:
    """A model and its data.

    Args:
        load: the FP32 model, in eval mode.
        blank: the same class with random weights, for tools that cannot reload without it.
        calls: calibration, as `pared.fit` takes it: batches, or a function that calls the model.
        parts: of a float model; calibrated only if asked, since that may need the model to run.
        joined: a model that `watch` and `shapes` can call, from its parts in another engine.
        shapes: what is timed: by name, a function of a model that gives a tensor.
        watch: what judging needs to see of a model, a tensor; run once over data that calibrate nothing.
        judge: what was seen, beside what was seen of FP32.
        score, fidelity: what `Judgement` holds.
        transformer: tools that ask are told so.
    """

    title: str
    load: Callable[[], nn.Module]
    blank: Callable[[], nn.Module]
    calls: Callable[[], Any]
    parts: Callable[[nn.Module], Mapping[str, Part]]
    joined: Callable[[Mapping[str, Run]], nn.Module]
    shapes: Callable[[], Mapping[str, Callable[[nn.Module], Tensor]]]
    watch: Callable[[nn.Module], Tensor]
    judge: Callable[[Tensor, Tensor], Judgement]
    score: str
    higher_is_better: bool
    fidelity: str
    transformer: bool = False
    entries: Callable[[nn.Module], Sequence[nn.Module]] = field(default=lambda model: (model,))


def randomized(model: nn.Module) -> nn.Module:
    """The model itself, with other weights: what is reloaded into it cannot be what was there."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
    return model


def decibels(got: Tensor, expected: Tensor) -> float:
    """Signal to noise of an output beside FP32's."""
    noise = (got.double() - expected.double()).square().sum()
    return float(10 * (expected.double().square().sum() / noise.clamp(min=1e-30)).log10())


def first(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


class Single(nn.Module):
    """A model of one part that takes and gives a tensor."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)[0]


def single(calls: Callable[[], list[Tensor]], dynamic: Mapping[int, str]) -> Callable[[nn.Module], Mapping[str, Part]]:
    """The only part of a model that takes and gives a tensor."""

    def parts(model: nn.Module) -> Mapping[str, Part]:
        return {"model": Part(model, ("x",), ("y",), [(call,) for call in calls()], {"x": dynamic})}

    return parts


def join_single(runs: Mapping[str, Run]) -> nn.Module:
    return Single(runs["model"])
