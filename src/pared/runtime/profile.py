"""Which kernel runs where, on one machine: measured, kept beside the artifact, reused on an equal machine."""

from __future__ import annotations

import json
import logging
import math
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch

from pared.runtime.graphs.call_kinds import Argument, describe_kind
from pared.runtime.kernels.machine import extensions

log = logging.getLogger(__name__)

ENGINE_FILE: Final = "engine.json"  # beside the artifact


# What is not the default, float32 in modules and each layer by itself, takes so much of its time at most: else the
# difference is noise, or not worth the rounding.
WORTH: Final = 0.9


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
        """The fastest, if it is faster than float32 by a tenth at least.

        >>> Timing((1, 2), 3.0, 2.0, 2.5).kernel, Timing((1, 2), 3.0, 3.5, 2.9).kernel
        ('bfloat16', 'float32')
        """
        best: Kernel = "bfloat16" if self.bfloat16_ms < self.int8_ms else "int8"
        return best if min(self.bfloat16_ms, self.int8_ms) <= WORTH * self.float32_ms else "float32"


@dataclass(frozen=True)
class CallTiming:
    """The measured times of one call of a model, or of a part of one.

    Args:
        arguments: of the call, without their numbers.
        float32_ms: the best of several runs of the float model, in milliseconds.
        bfloat16_ms: of a copy in bfloat16, from and to float32; None if there is none.
        modules_ms: of the quantized model, each layer with its own kernel.
        graph_ms: of its graph; None if there is none.
        because: why something is None.
    """

    arguments: tuple[Argument, ...]
    float32_ms: float
    bfloat16_ms: float | None
    modules_ms: float
    graph_ms: float | None
    because: str = ""

    @property
    def kind(self) -> str:
        """The kind of call, as text."""
        return describe_kind(self.arguments)

    def __str__(self) -> str:
        """One line, for people."""
        sizes = ", ".join(f"{one.name} {' x '.join(map(str, one.shape))}" for one in self.arguments if one.dtype)
        times = {
            "float32": self.float32_ms,
            "bfloat16": self.bfloat16_ms,
            "quantized by layers": self.modules_ms,
            "as a graph": self.graph_ms,
        }
        shown = ", ".join(f"{name} {ms:.3g}" for name, ms in times.items() if ms is not None)
        return f"{sizes or 'a call'}: {shown} ms" + (f" ({self.because})" if self.because else "")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CallTiming:
        """The inverse of `dataclasses.asdict`."""
        arguments = tuple(Argument(**{**one, "shape": tuple(one["shape"])}) for one in data["arguments"])
        for name, ms in data.items():
            if name.endswith("_ms") and ms is not None and not 0 < ms < math.inf:
                raise ValueError(f"{name} is {ms}")
        return cls(**{**data, "arguments": arguments})


@dataclass(frozen=True)
class Running:
    """What a module that may run in int8 runs in here, and why if it is something else."""

    kernel: Kernel
    because: str = ""


@dataclass(frozen=True)
class Whole:
    """The measured calls of a model, or of a part of one, and what they say about all that it is made of.

    Args:
        calls: those that were timed; none if nothing was.
    """

    calls: tuple[CallTiming, ...] = ()

    @property
    def graphs(self) -> tuple[tuple[Argument, ...], ...]:
        """The calls, one for each call kind, in which a graph is faster than modules.

        By a tenth at least: on the whole, or in one of the calls and slower in none.
        """
        return tuple(arguments for own, arguments in self._by_kind if _is_worth_a_graph(own))

    @property
    def largest_calls(self) -> tuple[tuple[Argument, ...], ...]:
        """The largest calls, one for each call kind."""
        return tuple(arguments for _, arguments in self._by_kind)

    @property
    def _by_kind(self) -> list[tuple[list[CallTiming], tuple[Argument, ...]]]:
        """The calls of each kind, and the arguments of the largest."""
        found: dict[str, list[CallTiming]] = {}
        for one in self.calls:
            found.setdefault(one.kind, []).append(one)
        return [(own, max((one.arguments for one in own), key=_numbers)) for own in found.values()]

    @property
    def kernel(self) -> Kernel:
        """What all of it runs in: "int8" (each layer in its own kernel) if that beats float by a tenth at least.

        Over the calls that were measured, by the geometric mean; int8 if none was.
        """
        if not self.calls:
            return "int8"
        if min(self._int8, self._bfloat16) > WORTH:
            return "float32"
        return "int8" if self._int8 <= self._bfloat16 else "bfloat16"

    @property
    def is_served(self) -> bool:
        """Whether something else than its modules answers calls."""
        return self.kernel == "bfloat16" or (self.kernel == "int8" and bool(self.graphs))

    @property
    def share(self) -> float:
        """The time that the calls take in what is fastest, as a share of float32's; 1 if none was timed."""
        return min(self._int8, self._bfloat16, 1.0) if self.calls else 1.0

    @property
    def _bfloat16(self) -> float:
        """The share of their time in bfloat16; infinite if there is none for one of them."""
        return _mean(one.bfloat16_ms / one.float32_ms if one.bfloat16_ms else math.inf for one in self.calls)

    @property
    def _int8(self) -> float:
        """The share of their time in int8."""
        served = {describe_kind(arguments) for arguments in self.graphs}
        times = [(one.graph_ms if one.kind in served else None) or one.modules_ms for one in self.calls]
        return _mean(ms / one.float32_ms for ms, one in zip(times, self.calls, strict=True))

    def summary(self, name: str = "") -> list[str]:
        """What runs, and the times that decided it, as lines for people.

        Args:
            name: of the part.
        """
        if not self.calls:
            return []
        chosen = {
            "int8": "as a graph, each layer in its own kernel" if self.graphs else "layer by layer",
            "float32": "in float32: nothing else was faster by a tenth",
            "bfloat16": "in bfloat16, which was faster than int8; calls of other kinds layer by layer",
        }[self.kernel]
        what = f"called by itself, {name} runs" if name else "runs"
        return [f"{what} {chosen} (measured on this machine):", *(f"  {one}" for one in self.calls)]


@dataclass(frozen=True)
class Profile:
    """Measured choices of kernels, and the machine they hold for.

    Args:
        machine: see `this_machine`.
        layers: the times of each layer by itself, by name.
        whole: of the model.
        parts: of its parts that may be called by themselves, by name: those that something else than modules answers.
        together: the whole model was faster with every layer in int8 that may be, whatever is fastest for each alone.
    """

    machine: Mapping[str, Any]
    layers: Mapping[str, Timing] = field(default_factory=dict)
    whole: Whole = field(default_factory=Whole)
    parts: Mapping[str, Whole] = field(default_factory=dict)
    together: bool = False

    def to_json(self) -> str:
        """The text of `engine.json`."""
        layers = {name: asdict(timing) for name, timing in sorted(self.layers.items())}
        calls = {name: [asdict(timing) for timing in one.calls] for name, one in {"": self.whole, **self.parts}.items()}
        data = {"machine": dict(self.machine), "together": self.together, "layers": layers, "calls": calls}
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """The inverse of `to_json`. Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
        data = json.loads(text)
        layers = {
            name: Timing(**{**timing, "shape": tuple(timing["shape"])}) for name, timing in data["layers"].items()
        }
        parts = {name: Whole(tuple(map(CallTiming.from_json, calls))) for name, calls in data["calls"].items()}
        return cls(dict(data["machine"]), layers, parts.pop("", Whole()), parts, bool(data.get("together", False)))

    def summary(self) -> list[str]:
        """What runs, and the times that decided it, as lines for people."""
        return self.whole.summary() + [line for name, one in self.parts.items() for line in one.summary(name)]

    def running(self, module: str, reason: str = "") -> Running:
        """What a module that may run in int8 runs in: the fastest here; int8 if it was never measured here.

        What is fastest in bfloat16 as a whole has its layers beside that, for calls of other kinds.

        Args:
            module: its name.
            reason: why its kernels cannot run here; empty if they can.

        >>> Profile(this_machine()).running("encoder").kernel
        'int8'
        """
        if reason:
            return Running("float32", reason)
        if self.whole.kernel == "float32":
            return Running("float32", "the whole model was faster in float32 here")
        timing = self.layers.get(module)
        kernel = "int8" if timing is None or self.together else timing.kernel
        return Running(kernel, "" if kernel == "int8" else "int8 was not the fastest here")


def _is_worth_a_graph(calls: Sequence[CallTiming]) -> bool:
    ratios = [one.graph_ms / one.modules_ms for one in calls if one.graph_ms is not None]
    faster = _mean(ratios) <= WORTH or (min(ratios, default=1.0) <= WORTH and max(ratios) <= 1.0)
    return len(ratios) == len(calls) and faster


def _mean(ratios: Iterable[float]) -> float:
    """The geometric mean; 1 of nothing."""
    logarithms = [math.log(one) for one in ratios]
    return math.exp(statistics.mean(logarithms)) if logarithms else 1.0


def _numbers(arguments: tuple[Argument, ...]) -> int:
    return sum(math.prod(one.shape) for one in arguments if one.dtype)


def this_machine() -> dict[str, Any]:
    """What a measurement depends on: processor, threads, torch."""
    return {
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "extensions": extensions(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def profile_beside(artifact: Path) -> Profile:
    """The measured choices of kernels in `engine.json`, if they hold for this machine; else none."""
    file = artifact.with_name(ENGINE_FILE)
    machine = this_machine()
    try:
        if not file.is_file():
            return Profile(machine)
        profile = Profile.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s cannot be read (%s): every layer that may run in int8 does", file, error)
        return Profile(machine)
    if profile.machine != machine:
        log.info("%s was measured on another machine: every layer that may run in int8 does", file)
        return Profile(machine)
    return profile
