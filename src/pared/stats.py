"""What calibration saw: one pass over the data, one collector per layer, frozen results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from pared import calls
from pared.errors import CalibrationError
from pared.layers import is_candidate
from pared.tensors import ModuleT, clone_structure

# Bounds of what is remembered of a layer's inputs: at most this many calls, and this many numbers of each.
_SAMPLED_CALLS: Final = 4
_SAMPLED_NUMBERS: Final = 1 << 16


@dataclass(frozen=True, eq=False)
class InputStats:
    """What one layer's input looked like.

    Args:
        low: the least value, or 0 if that is less.
        high: the greatest value, or 0 if that is greater.
        samples: parts of a few inputs (at most 4 of about 2^16 numbers), for comparing outputs.
        shape: the shape of the call with the median number of elements: the one that timing uses.
    """

    low: float
    high: float
    samples: tuple[Tensor, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Statistics:
    """The result of one pass: how many samples were seen, and the inputs of each layer that was called."""

    samples: int
    inputs: Mapping[str, InputStats]


def collect(model: nn.Module, calibration: calls.Calibration, limit: int) -> Statistics:
    """Run the calibration data through the model once and remember each candidate layer's inputs.

    Args:
        model: runs in eval mode, as a structural copy that shares its weights: it is left as it is.
        calibration: see `calls.run`.
        limit: of samples.

    Raises:
        CalibrationError: see `calls.run`; or a layer's input is NaN or infinite.
    """
    copied = shadow(model)
    collectors = {name: _Collector(name) for name, module in copied.named_modules() if is_candidate(module)}
    for name, collector in collectors.items():
        copied.get_submodule(name).register_forward_hook(collector, with_kwargs=True)
    samples = calls.run(copied, calibration, limit)
    found = {id(copied.get_submodule(name)): c.result() for name, c in collectors.items() if c.seen}
    every_name = copied.named_modules(remove_duplicate=False)  # a shared module goes by each of its names
    return Statistics(samples, {name: found[id(module)] for name, module in every_name if id(module) in found})


def shadow(model: ModuleT) -> ModuleT:
    """A copy in eval mode, for functions of the user, which may do with it what they like."""

    def copied(tensor: Tensor) -> Tensor:
        data = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(data, requires_grad=tensor.requires_grad) if is_parameter else data

    return clone_structure(model, copied).eval()


class _Collector:
    """A forward hook that remembers one layer's inputs in bounded memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.low = self.high = 0.0
        self.plain = True
        self.samples: list[Tensor] = []
        self.shapes: Counter[tuple[int, ...]] = Counter()

    @property
    def seen(self) -> bool:
        return bool(self.shapes) and self.plain

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if len(args) != 1 or kwargs or type(args[0]) is not Tensor or type(output) is not Tensor:
            self.plain = False  # a subclass that is called in its own way cannot be tried by itself
            return
        x = args[0].detach()
        if x.numel() == 0:
            return
        self.shapes[tuple(x.shape)] += 1
        if not x.is_floating_point():
            return
        low, high = (bound.item() for bound in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError(
                f"its input holds {'NaN' if math.isnan(low) else 'Inf'} during calibration",
                where=self.name,
                remedy="Check the calibration data, and that the float model itself is sound on them.",
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        if len(self.samples) < _SAMPLED_CALLS:
            self.samples.append(_part(x))

    def result(self) -> InputStats:
        by_size = sorted(self.shapes.elements(), key=lambda shape: (math.prod(shape), shape))
        return InputStats(self.low, self.high, tuple(self.samples), by_size[len(by_size) // 2])


def _part(x: Tensor) -> Tensor:
    """Evenly spaced entries of the first dimension that has several, so that about `_SAMPLED_NUMBERS` remain."""
    if x.numel() <= _SAMPLED_NUMBERS or x.dim() < 2:
        return x.clone()
    keep = max(1, x.shape[0] * _SAMPLED_NUMBERS // x.numel())
    return x[torch.linspace(0, x.shape[0] - 1, keep).long()].clone()
