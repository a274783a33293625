"""Which kernel runs where, on one machine: measured, kept beside the artifact, reused on an equal machine."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from pared.kernels.machine import available
from pared.tensors import clone_structure

# The best of many runs is compared: at least so many, and for short ones until so many seconds have passed, since a
# busy machine slows whole stretches of time. Runs before these warm caches and pack weights.
_LEAST_RUNS: Final = 7
_MOST_RUNS: Final = 200
_SECONDS: Final = 0.06
_WARM_UP: Final = 2


@dataclass(frozen=True)
class Timing:
    """One layer's measured times.

    Args:
        kernel: what runs: "int8" only if it was faster than both others.
        shape: of the input that was timed.
        float32_ms, bfloat16_ms, int8_ms: the best of several runs, in milliseconds.
    """

    kernel: Literal["int8", "float"]
    shape: tuple[int, ...]
    float32_ms: float
    bfloat16_ms: float
    int8_ms: float


@dataclass(frozen=True)
class Profile:
    """Measured choices of kernels, and the machine they hold for."""

    machine: Mapping[str, Any]
    layers: Mapping[str, Timing] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of `engine.json`."""
        layers = {name: asdict(timing) for name, timing in sorted(self.layers.items())}
        return json.dumps({"machine": dict(self.machine), "layers": layers}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
        data = json.loads(text)
        layers = {
            name: Timing(**{**timing, "shape": tuple(timing["shape"])}) for name, timing in data["layers"].items()
        }
        return cls(dict(data["machine"]), layers)

    def runs_int8(self, module: str) -> bool:
        """Whether a layer may run in int8 here: measured to be faster, or never measured on this machine.

        >>> Profile(this_machine()).runs_int8("encoder") == (available() == "")
        True
        """
        if available():
            return False
        timing = self.layers.get(module)
        return timing is None or timing.kernel == "int8"


def this_machine() -> dict[str, Any]:
    """What a measurement depends on: processor, threads, torch."""
    return {
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def measure(module: nn.Module, counterpart: nn.Module, shape: tuple[int, ...]) -> Timing:
    """Time a float layer, the same in bfloat16, and its counterpart on random input of one shape, interleaved.

    Args:
        module: the float layer, holding the weight that the counterpart decodes to; left as it is.
        counterpart: the same layer in int8.
        shape: of the input.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    half = clone_structure(module, lambda tensor: tensor.detach().clone()).bfloat16()
    x_half = x.bfloat16()
    runs: tuple[Callable[[], Tensor], ...] = (lambda: module(x), lambda: half(x_half), lambda: counterpart(x))
    best = [float("inf")] * len(runs)
    with torch.inference_mode():
        begin = time.perf_counter()
        for attempt in range(_WARM_UP + _MOST_RUNS):
            for i, run in enumerate(runs):
                start = time.perf_counter()
                run()
                if attempt >= _WARM_UP:
                    best[i] = min(best[i], time.perf_counter() - start)
            if attempt >= _WARM_UP + _LEAST_RUNS and time.perf_counter() - begin > _SECONDS:
                break
    float32, bfloat16, int8 = (1e3 * seconds for seconds in best)
    return Timing("int8" if int8 < min(float32, bfloat16) else "float", shape, float32, bfloat16, int8)
