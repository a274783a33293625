"""Static ranges that cut off extremes where that does less squared error: the rule of most peers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pared.fitting.calibration.gathering.noise import LEVELS
from pared.fitting.calibration.observe import InputStats, Statistics

_SHRUNK = tuple(i / 20 for i in range(4, 21))  # shares of either end
_KEPT = 1 << 14  # numbers of each call


def of_least_error(model: nn.Module, seen: Statistics) -> Mapping[str, InputStats]:
    """The ranges of all layers, each of the least mean squared error of its own input."""
    samples: dict[str, list[Tensor]] = {name: [] for name in seen.inputs}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                flat = args[0].reshape(-1)
                # The extremes always: it is they that are cut off, or not.
                some = flat[:: max(1, len(flat) // _KEPT)]
                samples[name].append(torch.cat([some, flat.min()[None], flat.max()[None]]))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in samples]
    try:
        with torch.no_grad():
            for call in seen.calls:
                model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _least(one, torch.cat(samples[name])) if samples[name] else one for name, one in seen.inputs.items()}


def _least(one: InputStats, values: Tensor) -> InputStats:
    def error(ends: tuple[float, float]) -> float:
        low, high = ends
        step = (high - low) / LEVELS or 1.0
        rounded = ((values - low) / step).round().clamp(0, LEVELS) * step + low
        return float((rounded - values).square().mean())

    low, high = min(((one.low * a, one.high * b) for a in _SHRUNK for b in _SHRUNK), key=error)
    return replace(one, low=low, high=high)
