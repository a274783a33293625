"""Which kernel runs each layer: measured on one machine, kept beside the artifact, reused on machines like it."""

from __future__ import annotations

import functools
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from pared.errors import CorruptError, ParedError
from pared.files.checks import Place
from pared.runtime.kernels.machine import extensions
from pared.runtime.profile.timings import CallTiming, Form, Kernel, ModelTiming, Timing, timing_from_json
from pared.switches import threads_asked

log = logging.getLogger(__name__)

ENGINE_FILE: Final = "engine.json"  # beside the artifact

BUSY: Final = (
    "the machine was busy while this was measured: what replaces layers in int8 had to be far faster, and the first "
    "calls measure again; pared.tune_speed on an idle machine settles it"
)
_NO_OPENVINO: Final = "OpenVINO was not tried, as it is not installed: pip install 'pared[fast]'"
_NAMES: Final[dict[Form, str]] = {
    "float32": "in float32",
    "bfloat16": "in bfloat16",
    "graph": "as a graph",
    "openvino": "in OpenVINO",
}
_LATER: Final = "onnxruntime"  # which older files lack
_LARGEST: Final = 1 << 24  # bytes of a file
# `load` makes a graph for each kind of call. `fit` times at most nine calls of the model, and a few others.
_MOST_CALLS: Final = 100
_MOST_ARGUMENTS: Final = 10_000  # of all calls together, with the tensors that they hold
_FLAGS: Final = ("together", "busy")


@dataclass(frozen=True)
class Running:
    """The kernel of a module that may run in int8, and the reason if it is another one."""

    kernel: Kernel
    because: str = ""


@dataclass(frozen=True)
class Profile:
    """The measured times that decide which kernel runs each layer, and the machine they hold for.

    Args:
        machine: what `this_machine` returned there.
        layers: the times of each layer on its own, by name.
        model: the times of the whole model.
        submodels: the times of those submodels that are also called on their own and run as a graph or in bfloat16.
        together: the model was fastest with every layer in int8 that may be, whatever is fastest for each on its own.
        busy: other processes were given the processor while this was measured.
        score: what `eval_func` gave for the model as it runs here; None if it was not called for that.
    """

    machine: Mapping[str, Any]
    layers: Mapping[str, Timing] = field(default_factory=dict)
    model: ModelTiming = field(default_factory=ModelTiming)
    submodels: Mapping[str, ModelTiming] = field(default_factory=dict)
    together: bool = False
    busy: bool = False
    score: float | None = None

    @property
    def forms(self) -> tuple[Form, ...]:
        """What answers calls in place of the modules, of the model or of submodels; empty if nothing does."""
        return tuple(dict.fromkeys(form for one in (self.model, *self.submodels.values()) for form in one.forms))

    def without(self, form: Form, reason: str) -> Profile:
        """The same without the times of a form, and why."""
        submodels = {name: timing.without(form, reason) for name, timing in self.submodels.items()}
        return replace(self, model=self.model.without(form, reason), submodels=submodels)

    def __post_init__(self) -> None:
        """Where several threads were timed on a busy machine, times are doubtful."""
        doubtful = self.busy and self.machine.get("threads") != 1  # of one thread, time on the processor is exact
        if self.model.is_doubtful != doubtful:
            object.__setattr__(self, "model", replace(self.model, is_doubtful=doubtful))

    def to_json(self) -> str:
        """The text of `engine.json`."""
        layers = {name: asdict(timing) for name, timing in sorted(self.layers.items())}
        calls = {name: asdict(timing)["calls"] for name, timing in {"": self.model, **self.submodels}.items()}
        found = {"together": self.together, "busy": self.busy, "score": self.score}
        data = {"machine": dict(self.machine), **found, "layers": layers, "calls": calls}
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = ENGINE_FILE) -> Profile:
        """The inverse of `to_json`.

        Raises:
            CorruptError: it is anything else. It may come from anyone, and decides which kernels run.
        """
        at = Place(where)
        data = at.json(text.encode() if isinstance(text, str) else text, "it")
        known = at.fields(data, "it", ("machine", "layers", "calls"), (*_FLAGS, "score"))
        if any(type(known.get(name, False)) is not bool for name in _FLAGS):
            at.fail(f"its {' or '.join(_FLAGS)} is neither true nor false")
        layers = {name: timing_from_json(one, at) for name, one in at.mapping(known["layers"], "its 'layers'").items()}
        models = {
            name: ModelTiming(tuple(CallTiming.from_json(one, at) for one in at.sequence(calls, "a list of calls")))
            for name, calls in at.mapping(known["calls"], "its 'calls'").items()
        }
        every = [call for one in models.values() for call in one.calls]
        if len(every) > _MOST_CALLS or sum(len(call.arguments) for call in every) > _MOST_ARGUMENTS:
            at.fail("it holds far more calls than are ever timed")
        model = models.pop("", ModelTiming())
        together, busy = (known.get(name, False) is True for name in _FLAGS)
        score = known.get("score")
        score = None if score is None else at.number(score, "its 'score'")
        return cls(at.mapping(known["machine"], "its 'machine'"), layers, model, models, together, busy, score)

    def summary(self) -> list[str]:
        """How everything runs, and the times that decided it, as lines for people."""
        timings = {"": self.model, **self.submodels}
        notes = [BUSY] if self.busy else []
        notes += [_NO_OPENVINO] if self.model.calls and not self.machine.get("openvino") else []
        return [*(line for name, timing in timings.items() for line in timing.summary(name)), *notes]

    def running(self, module: str, reason: str = "") -> Running:
        """The kernel of a module that may run in int8: the fastest on this machine, or int8 if it was not measured.

        A model that runs in bfloat16 as a whole keeps its layers' kernels for other kinds of calls.

        Args:
            module: the module's name.
            reason: why its int8 kernel cannot run on this machine; empty if it can.

        >>> Profile(this_machine()).running("encoder").kernel
        'int8'
        """
        if reason:
            return Running("float32", reason)
        if self.model.kernel == "float32":
            return Running("float32", "the whole model is faster in float32 on this machine")
        timing = self.layers.get(module)
        kernel = "int8" if timing is None or self.together else timing.kernel
        because = timing.because if timing is not None else ""
        return Running(kernel, "" if kernel == "int8" else because or "int8 is not the fastest on this machine")


def this_machine() -> dict[str, Any]:
    """What a measurement depends on: the processor, the number of threads, and the versions of the runtimes."""
    return {
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "extensions": extensions(),
        "threads": threads_asked(),
        "torch": str(torch.__version__),
        "openvino": _version("openvino"),
        _LATER: _version("onnxruntime") if _version("onnx") else "",
    }


@functools.cache
def _version(package: str) -> str:
    """The installed version of a package; empty if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def profile_beside(artifact: Path) -> Profile:
    """The profile in the `engine.json` beside an artifact if it holds for this machine, else an empty one."""
    file = artifact.with_name(ENGINE_FILE)
    machine = this_machine()
    try:
        if not file.is_file():
            return Profile(machine)
        if (nbytes := file.stat().st_size) > _LARGEST:
            raise CorruptError(f"has {nbytes:,} bytes, far more than measured times take", where=str(file))
        profile = Profile.from_json(file.read_bytes(), str(file))
    except (OSError, ParedError) as error:
        why = error.what if isinstance(error, ParedError) else error
        log.warning("%s cannot be read (%s): every layer that may run in int8 will", file, why)
        return Profile(machine)
    if {_LATER: machine[_LATER], **profile.machine} != machine:
        forms = " and ".join(_NAMES[form] for form in profile.forms) or "layer by layer"
        what = f"it was timed on another machine, where it runs {forms}; pared.tune_speed times it on this one"
        log.info("%s: %s", file, what)
        return Profile(machine, model=ModelTiming(because=what))
    return profile
