"""Which kernel runs where, on one machine: measured, kept beside the artifact, reused on an equal machine."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn

from pared.stats import Call

log = logging.getLogger(__name__)

ENGINE_FILE: Final = "engine.json"  # beside the artifact

# The best of many runs is compared: at least so many, and for short ones until so many seconds have passed, since a
# busy machine slows whole stretches of time. Runs before these warm caches and pack weights.
_LEAST_RUNS: Final = 7
_MOST_RUNS: Final = 200
_SECONDS: Final = 0.06
_WARM_UP: Final = 2


Kernel = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True)
class Timing:
    """One layer's measured times, from input to output in the layer's own type.

    Args:
        shape: of the input that was timed.
        float32_ms: the best of several runs of the float layer as it is, in milliseconds.
        bfloat16_ms: the same with weight and input turned into bfloat16, and the output turned back.
        int8_ms: the same in int8.
    """

    shape: tuple[int, ...]
    float32_ms: float
    bfloat16_ms: float
    int8_ms: float

    @property
    def kernel(self) -> Kernel:
        """The fastest.

        >>> Timing((1, 2), 3.0, 2.0, 2.5).kernel
        'bfloat16'
        """
        best = min(self.float32_ms, self.bfloat16_ms, self.int8_ms)
        if self.float32_ms == best:
            return "float32"
        return "bfloat16" if self.bfloat16_ms == best else "int8"


@dataclass(frozen=True)
class Running:
    """What a module that may run in int8 runs in here, and why if it is something else."""

    kernel: Kernel
    because: str = ""


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

    def running(self, module: str, reason: str = "") -> Running:
        """What a module that may run in int8 runs in: the fastest here; int8 if it was never measured here.

        Args:
            module: its name.
            reason: why its kernels cannot run here; empty if they can.

        >>> Profile(this_machine()).running("encoder").kernel
        'int8'
        """
        if reason:
            return Running("float32", reason)
        timing = self.layers.get(module)
        kernel = "int8" if timing is None else timing.kernel
        return Running(kernel, "" if kernel == "int8" else "int8 was not the fastest here")


def this_machine() -> dict[str, Any]:
    """What a measurement depends on: processor, threads, torch."""
    return {
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def measure(
    layers: Mapping[Kernel, nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    call: Call | None = None,
) -> Timing:
    """Time one layer in each of its forms, interleaved.

    Args:
        layers: the float layer, and its counterparts in bfloat16 and int8.
        shape: of the input.
        dtype: of the input.
        call: what each is called with; None: random numbers of the shape and the type.
    """
    call = call or Call((torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype),), {})
    best = dict.fromkeys(layers, float("inf"))
    with torch.inference_mode():
        begin = time.perf_counter()
        for attempt in range(_WARM_UP + _MOST_RUNS):
            for kernel, layer in layers.items():
                start = time.perf_counter()
                layer(*call.args, **call.kwargs)
                if attempt >= _WARM_UP:
                    best[kernel] = min(best[kernel], time.perf_counter() - start)
            if attempt >= _WARM_UP + _LEAST_RUNS and time.perf_counter() - begin > _SECONDS:
                break
    return Timing(shape, *(1e3 * best[kernel] for kernel in ("float32", "bfloat16", "int8")))


def profile_beside(artifact: Path) -> Profile:
    """The measured choices of kernels in `engine.json`, if they hold for this machine; else none."""
    file = artifact.with_name(ENGINE_FILE)
    machine = this_machine()
    if not file.is_file():
        return Profile(machine)
    try:
        profile = Profile.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): every layer that may run in int8 does", file, error)
        return Profile(machine)
    if profile.machine != machine:
        log.info("%s was measured on another machine: every layer that may run in int8 does", file)
        return Profile(machine)
    return profile
