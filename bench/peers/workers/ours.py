"""pared at 8 bits: in the form that `fit` chose, in each of the others, and searched to a size."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from typing import Any

from torch import nn

import pared
from bench.peers.families import CHOSEN, FORMS
from bench.peers.peer import Peer, Task
from pared import PostTrainingQuantConfig
from pared.runtime.profile.profile import ENGINE_FILE, Profile
from pared.runtime.profile.timings import CallTiming, ModelTiming

_ALL_SAMPLES = 10**6  # what a subject gives for calibration is read whole
_NEVER = 1e3  # how many times slower the forms are said to be that are not wanted


class EightBits(Peer):
    settings = "`fit(quant_level=0)`"
    needs = "model class"

    def config(self, task: Task) -> PostTrainingQuantConfig:  # noqa: ARG002  # the other needs it
        return PostTrainingQuantConfig(quant_level=0, calibration_sampling_size=_ALL_SAMPLES)

    def compress(self, task: Task, prepared: nn.Module) -> nn.Module:
        return pared.fit(prepared, self.config(task), task.subject.calls(), quiet=True)

    def save(self, task: Task, compressed: nn.Module) -> None:
        pared.save(compressed, task.folder)

    def module(self, task: Task, compressed: nn.Module) -> nn.Module:
        listen(task)
        return compressed

    def reload(self, task: Task) -> nn.Module:
        listen(task)
        return pared.load(task.folder, model=task.subject.blank())

    def form(self, task: Task) -> str:
        return form_of(_profile(task))


class AsSmall(EightBits):
    """No larger than the smallest of the others in the same run, with all files that are saved beside the weights."""

    settings = "`fit(max_size=...)`: that of the smallest file of the others, less 1 %"

    def config(self, task: Task) -> PostTrainingQuantConfig:
        if task.smallest is None:
            raise ValueError("No other tool has written a file in this run, so there is no size to match.")
        return PostTrainingQuantConfig(max_size=task.smallest * 99 // 100, calibration_sampling_size=_ALL_SAMPLES)


class OneForm(EightBits):
    """The files of `CHOSEN`, with an `engine.json` whose times make one form the fastest."""

    def __init__(self, field: str) -> None:
        self.field, self.settings = field, f"the files of `{CHOSEN}`, with an `{ENGINE_FILE}` in which {field} is least"

    def prepare(self, task: Task) -> Any:
        source = task.folder.parent.parent / CHOSEN / task.folder.name
        if not (source / ENGINE_FILE).is_file():
            raise ValueError(f"{CHOSEN} has written no files in this run.")
        shutil.copytree(source, task.folder, dirs_exist_ok=True)

    def compress(self, task: Task, prepared: Any) -> nn.Module:  # noqa: ARG002  # everything is in the folder
        changed = preferring(_profile(task), self.field)
        (task.folder / ENGINE_FILE).write_text(changed.to_json(), encoding="utf-8")
        return self.reload(task)

    def save(self, task: Task, compressed: nn.Module) -> None:
        """It is there already."""


def _profile(task: Task) -> Profile:
    return Profile.from_json((task.folder / ENGINE_FILE).read_bytes())


def preferring(profile: Profile, form: str) -> Profile:
    """A profile by which the model's calls run in one form, whatever is fastest; kernels of layers stay.

    Args:
        form: "modules_ms", "graph_ms" or "openvino_ms".

    Raises:
        ValueError: no call of the model or of a submodel can run in that form; the error says why.
    """
    timings = {"": profile.model, **profile.submodels}
    calls = [call for timing in timings.values() for call in timing.calls]
    if form != "modules_ms" and not any(getattr(call, form) for call in calls):
        why = dict.fromkeys(call.because for call in calls if call.because)
        raise ValueError(f"there is no such form: {'; '.join(why) or 'nothing was timed'}")
    changed = {
        name: replace(timing, calls=tuple(_preferring(call, form) for call in timing.calls))
        for name, timing in timings.items()
    }
    return replace(profile, model=changed.pop(""), submodels=changed)


def _preferring(call: CallTiming, form: str) -> CallTiming:
    """The call with times by which the wanted form is the fastest; where it has none, its modules are."""
    least = getattr(call, form) or call.modules_ms
    if least is None:
        return call
    others: dict[str, float | None] = dict.fromkeys(("graph_ms", "openvino_ms", "bfloat16_ms"))
    wanted = {form: least} if getattr(call, form) else {}
    modules = least * (_NEVER if form in wanted and form in others else 1)
    times = {**others, "modules_ms": modules, "float32_ms": _NEVER**2 * least, **wanted}
    return replace(call, **times)  # type: ignore[arg-type]  # all of them are times


def form_of(profile: Profile) -> str:
    """Which form answers the calls of the model and its submodels, in words."""
    models: dict[str, ModelTiming] = {"": profile.model, **profile.submodels}
    said = dict.fromkeys(_form(timing) for timing in models.values() if timing.calls)
    return ", ".join(said) or FORMS["pared-layers"]


def _form(timing: ModelTiming) -> str:
    if timing.kernel == "float32":
        return "in float32"
    words = {"openvino": FORMS["pared-openvino"], "graph": FORMS["pared-graph"]}
    return " and ".join(words.get(form, f"in {form}") for form in timing.forms) or FORMS["pared-layers"]


class _Notes(logging.Handler):
    """Keeps warnings, which say for instance that a graph was given up."""

    def __init__(self, task: Task) -> None:
        super().__init__(logging.WARNING)
        self.task = task

    def emit(self, record: logging.LogRecord) -> None:
        self.task.notes.append(record.getMessage())


def listen(task: Task) -> None:
    """Warnings of the library become notes of the row."""
    log = logging.getLogger("pared")
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes(task))


PEERS: dict[str, Peer] = {
    CHOSEN: EightBits(),
    "pared-layers": OneForm("modules_ms"),
    "pared-graph": OneForm("graph_ms"),
    "pared-openvino": OneForm("openvino_ms"),
    "pared-small": AsSmall(),
}
