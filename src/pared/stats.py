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
        copied.get_submodule(name).register_forward_pre_hook(collector)
    samples = calls.run(copied, calibration, limit)
    return Statistics(samples, {name: c.result() for name, c in collectors.items() if c.seen})


def shadow(model: ModuleT) -> ModuleT:
    """A structural copy in eval mode that shares the parameters; buffers are copied, since a forward may write them."""
    return clone_structure(model, lambda t: t if isinstance(t, nn.Parameter) else t.detach().clone()).eval()


class _Collector:
    """A forward pre-hook that remembers one layer's inputs in bounded memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.low = self.high = 0.0
        self.samples: list[Tensor] = []
        self.shapes: Counter[tuple[int, ...]] = Counter()

    @property
    def seen(self) -> bool:
        return bool(self.shapes)

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor) or args[0].numel() == 0:
            return
        x = args[0].detach()
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
