"""What is fastest on this machine: int8, bfloat16 or float, layer by layer or as a graph. No artifact depends on it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from pared.artifact.envelope import find_artifact
from pared.errors import reason_of
from pared.files.disk import as_path
from pared.fitting.calibration import observe
from pared.fitting.calibration.observe import Statistics
from pared.fitting.search.activations import find_candidates
from pared.fitting.submodels import find_submodels
from pared.fitting.timing.forms import Forms, Outputs
from pared.fitting.timing.layers import time_layers
from pared.fitting.timing.steps import numbers_given, tensors_given
from pared.fitting.timing.threads import timed_with
from pared.model import calls, storage
from pared.model.calls import Call, smallest_like_first
from pared.model.contents import Contents, completed
from pared.model.copies import shadow
from pared.model.recorded import values
from pared.model.tensors import ModelTensors, ModuleT, find_tensors
from pared.runtime import float_forms, quantized
from pared.runtime.graphs.call_kinds import (
    arguments_of,
    bind,
    describe_kind,
    parameters_of,
)
from pared.runtime.graphs.capturing import kept
from pared.runtime.graphs.capturing.capture import Captures
from pared.runtime.kernels.machine import without_bfloat16
from pared.runtime.load import check_model
from pared.runtime.openvino.graph import is_installed
from pared.runtime.profile.profile import BUSY, ENGINE_FILE, Profile, this_machine
from pared.runtime.profile.timings import WORTH, CallTiming, ModelTiming
from pared.runtime.serving.agreement import agree
from pared.runtime.serving.float_copy import in_bfloat16
from pared.runtime.serving.graph_server import GraphServer
from pared.runtime.serving.openvino_server import OpenVinoServer
from pared.runtime.serving.served import warm_up
from pared.runtime.stopwatch import Spent
from pared.scalars import checked_number
from pared.switches import random_states_kept

log = logging.getLogger(__name__)

_MOST_KINDS: Final = 3  # of calls that are measured
_WORTH_TRYING: Final = 0.1  # the share of the layers' time in float32 from which on all are tried in int8
_KNOWN: Final = "it was timed before"
_OTHERS: Final = ("no bfloat16", "no openvino")  # how the reasons of those begin that were
_FAR: Final = 2  # a call this many times as large, or as slow, is far larger or slower
_LONG: Final = 0.1  # seconds of a call
_SAME: Final = 1e-3  # share of the energy by which the output of a sample may differ alone and among others


@dataclass(frozen=True)
class Timed:
    """What is fastest on this machine.

    Args:
        profile: the times.
        captures: the graphs of the model's calls, by the name of the submodel that is called; "" is the model.
    """

    profile: Profile
    captures: Mapping[str, Captures]

    def assembled(self, tensors: ModelTensors[ModuleT], contents: Contents) -> ModuleT:
        """The quantized model in its fastest form, whose graphs are made. It shares no captures with other models."""
        model = quantized.assemble(tensors, contents, self.profile)
        warm_up(model, self.captures)
        return model


def timed(tensors: ModelTensors[ModuleT], contents: Contents, seen: Statistics) -> Timed:
    """Measure which form of a quantized model is fastest on this machine.

    Args:
        tensors: those of the float model, which is left as it is.
        contents: everything that the artifact holds.
        seen: what calibration saw; its calls are made again.
    """
    spent = Spent()
    with timed_with(shadow(tensors.model), smallest_like_first(seen.calls)), spent.adding():
        found = _fastest(tensors, contents, seen)
    return replace(found, profile=replace(found.profile, busy=spent.is_busy))


def _fastest(tensors: ModelTensors[ModuleT], contents: Contents, seen: Statistics) -> Timed:
    """The fastest form.

    The model is timed first with every layer in int8. Where another runtime then answers every call, nobody needs to
    know what is fastest for each layer on its own, and where the copy in bfloat16 is hopeless, nor are its layers.
    """
    candidates = find_candidates(tensors.model, contents.tensors, seen.inputs)
    outright = tensors.in_copy(shadow(tensors.model))
    submodels = _submodels(outright.model, seen.calls)
    whole = Captures(make=kept.captured)
    captures = {"": whole, **{name: Captures(whole) for name in submodels}}
    measured = partial(_timed, outright, contents, calls=seen.calls, submodels=submodels, captures=captures)
    together = measured(Profile(this_machine(), together=True))
    if _is_elsewhere(together.model):
        return Timed(together, captures)
    hopeless = any(map(_is_hopeless, together.model.calls))
    layers = time_layers(candidates, contents.activations, in_bfloat16=not hopeless)
    if all(timing.kernel == "int8" for timing in layers.layers.values()):
        return Timed(replace(together, layers=layers.layers, together=False), captures)
    best = measured(layers, known=together.model.calls)
    has_graphs = bool(submodels) or any(call.graph_ms for call in best.model.calls)
    if not has_graphs or "openvino" in best.model.forms or _left(layers) < _WORTH_TRYING:
        return Timed(best, captures)
    # A layer that is slower on its own may be faster where a graph joins it with its neighbours.
    is_faster = together.model.kernel == "int8" and together.model.share <= WORTH * best.model.share
    return Timed(replace(together, layers=layers.layers) if is_faster else best, captures)


def _submodels(model: nn.Module, calls: Sequence[Call]) -> dict[str, Call]:
    """The outermost submodels that calls of any kind make, by name, each with a call.

    The largest call of each kind is made once more: an encoder that one runs is given to the next by its output. A step
    with a cache changes its arguments, so that none can be found in it.
    """
    names = parameters_of(model)
    kinds: dict[object, Call] = {}
    for call in sorted(calls, key=numbers_given):
        bound = bind(names, call.args, call.kwargs)
        kinds[None if bound is None else describe_kind(arguments_of(bound))] = call
    found: dict[str, Call] = {}
    for call in list(kinds.values())[-_MOST_KINDS:]:
        found |= find_submodels(model, call)
    return {name: call for name, call in found.items() if not any(name.startswith(f"{outer}.") for outer in found)}


def _is_elsewhere(timing: ModelTiming) -> bool:
    """Whether another runtime answers the calls of every kind and size."""
    answered = {one.example for one in timing.served if (one.form, one.least, one.below) == ("openvino", 0.0, math.inf)}
    return bool(timing.calls) and {describe_kind(one) for one in answered} == {call.kind for call in timing.calls}


def _left(profile: Profile) -> float:
    """The share of the layers' time in float32 that those take which are not fastest in int8."""
    total = sum(timing.float32_ms for timing in profile.layers.values())
    left = sum(timing.float32_ms for timing in profile.layers.values() if timing.kernel != "int8")
    return left / total if total else 0.0


def _timed(
    tensors: ModelTensors[nn.Module],
    contents: Contents,
    profile: Profile,
    *,
    calls: Sequence[Call],
    submodels: Mapping[str, Call],
    captures: Mapping[str, Captures],
    known: Sequence[CallTiming] = (),
) -> Profile:
    """The profile with the times of the submodels, and then of the model in which the fastest of these run.

    Args:
        tensors: those of the float model.
        contents: everything that the artifact holds.
        profile: says which layers run in int8.
        calls: what calibration saw.
        submodels: the submodels that are called on their own, each with a call.
        captures: the graphs captured so far, by the submodel's name.
        known: the times with other kernels, of which those hold that do not depend on the layers' kernels.
    """
    model, by_layers = tensors.model, quantized.assemble(tensors, contents, profile)
    if submodels:
        times = {
            name: ModelTiming(
                time_calls(model.get_submodule(name), by_layers.get_submodule(name), [call], captures[name])
            )
            for name, call in submodels.items()
        }
        profile = replace(profile, submodels={name: timing for name, timing in times.items() if timing.forms})
        by_layers = quantized.assemble(tensors, contents, profile, captures=captures)
    found = time_calls(model, by_layers, calls, captures[""], known=known)
    return replace(profile, model=ModelTiming(found))


def time_calls(
    model: nn.Module,
    by_layers: nn.Module,
    calls: Sequence[Call],
    captures: Captures,
    *,
    known: Sequence[CallTiming] = (),
) -> tuple[CallTiming, ...]:
    """Time a model, or a submodel, in all of its forms.

    Args:
        model: the float model or submodel, in eval mode.
        by_layers: the same, quantized, and run layer by layer.
        calls: the calls that calibration made. Of each kind the largest, the smallest and the first sample of the
            smallest are made again, small ones first. bfloat16 is given up if a call is far slower in it.
        captures: the graphs captured so far of this architecture.
        known: the times of the same model with other kernels in its layers: those in bfloat16 and in other runtimes
            hold for this one, too, as shares of those in float32.

    Returns:
        the times of the calls that can be made again. A form that raises an exception has no time.
    """
    names = parameters_of(model)
    exact = Outputs(model)
    found = chosen(calls, names, partial(_is_part, exact))
    bound = [bind(names, call.args, call.kwargs) for call in found]
    kinds = {describe_kind(arguments_of(b)): arguments_of(b) for b in reversed(bound) if b is not None}
    # A graph for each call kind, of its largest call.
    server = GraphServer(float_forms.outline_of, list(kinds.values()), captures)
    openvino = None
    if not known and is_installed():
        openvino = OpenVinoServer(float_forms.outline_of, list(kinds.values()), captures)
    half = _KNOWN if known else _copied_to_bfloat16(model)
    forms = Forms(model, half, by_layers, server, openvino, exact)
    times: list[CallTiming] = []
    for call, arguments in reversed(
        list(zip(found, bound, strict=True))
    ):  # what is hopeless is found out on small ones
        timing = forms.time(call, arguments, in_bfloat16=bool(known) or not any(map(_is_hopeless, times)))
        times[:0] = [] if timing is None else [timing]
    before = {one.arguments: one for one in known}
    return tuple(_completed(one, before.get(one.arguments)) for one in times)


def _completed(timing: CallTiming, known: CallTiming | None) -> CallTiming:
    """With the times of the forms that were timed before: they took the same share of float32's time."""
    if known is None:
        return timing
    factor = timing.float32_ms / known.float32_ms
    half, other = (ms and ms * factor for ms in (known.bfloat16_ms, known.openvino_ms))
    reasons = [why for why in timing.because.split("; ") if why and _KNOWN not in why]
    reasons += [why for why in known.because.split("; ") if why.startswith(_OTHERS)]
    return replace(timing, bfloat16_ms=half, openvino_ms=other, because="; ".join(reasons))


def _is_hopeless(timing: CallTiming) -> bool:
    """Whether bfloat16 was too slow to be tried again."""
    fastest = min(timing.float32_ms, timing.modules_ms or timing.float32_ms)
    return timing.bfloat16_ms is not None and timing.bfloat16_ms > _FAR * fastest


def _copied_to_bfloat16(model: nn.Module) -> Callable[..., Any] | str:
    """The model in bfloat16; or why there is none."""
    if without_bfloat16():
        return without_bfloat16()
    try:
        return in_bfloat16(model)
    except Exception as error:  # noqa: BLE001  # whatever the model's class makes of it becomes the reason
        return reason_of(error)


def chosen(recorded: Sequence[Call], names: Sequence[str], is_part: Callable[[Call, Call], bool]) -> list[Call]:
    """The calls that are timed: of each kind the largest, the smallest if it is far smaller, and a single sample.

    Args:
        recorded: the calls that calibration made.
        names: the names of the parameters of the model's `forward`.
        is_part: whether a call with a single sample of another one gives that sample's output.
    """
    kinds: dict[object, list[Call]] = {}
    for call in recorded:
        bound = bind(names, call.args, call.kwargs)
        kinds.setdefault(None if bound is None else describe_kind(arguments_of(bound)), []).append(call)
    found = []
    for same in list(kinds.values())[:_MOST_KINDS]:
        largest, smallest = max(same, key=numbers_given), min(same, key=numbers_given)
        found += [largest, *([smallest] if _FAR * numbers_given(smallest) < numbers_given(largest) else [])]
        single = calls.first_samples(smallest, 1)
        found += [single] if single is not None and is_part(single, smallest) else []
    return found


def _is_part(exact: Outputs, single: Call, whole: Call) -> bool:
    """Whether a model takes a single sample, and gives for it what it gives for that sample among the others.

    The first dimension of an input need not count samples, and a model may be made for a batch of a fixed size. Where a
    single sample takes long, what comes with each call hardly counts, and the other calls say what is fastest.
    """
    count = len(tensors_given(whole)[0])

    def equal(alone: Tensor, among: Tensor) -> bool:
        return agree(alone, among[:1] if among.dim() and len(among) == count else among, _SAME)

    try:
        alone, spent = exact(single)
        return spent.seconds < _LONG and values.same(alone, exact(whole)[0], equal)
    except Exception as error:  # noqa: BLE001  # nobody asked for this call
        log.debug("a single sample is not timed: %s", reason_of(error))
        return False


@random_states_kept()
def tune_speed(
    path: str | Path, model: ModuleT, calib_dataloader: calls.Calibration, *, calibration_sampling_size: int = 100
) -> ModuleT:
    """Measure what is fastest on this machine, and write it to `engine.json`; the artifact stays as it is.

    `fit` measures this too. Measure again on another machine, with another number of threads, or if your calls have
    other sizes than the calibration data of `fit`. While a machine is busy, only time on the processor counts, which
    is a rougher measure: the report says so, and this function tells the log.

    Args:
        path: the directory that `save` wrote, or the artifact in it.
        model: any instance of the architecture, as for `load`; its numbers are not used.
        calib_dataloader: calls of the sizes that you will make, in the form that `fit` takes. Only sizes and types
            matter, not the numbers.
        calibration_sampling_size: the number of samples read; reading stops after the batch that reaches it.

    Returns:
        the quantized model as `load` will return it from now on.

    Raises:
        ParedError: as `load` does, and as `fit` does for the calibration data.
    """
    check_model(model, "pared.tune_speed")
    limit = checked_number(
        "pared.tune_speed", "calibration_sampling_size", calibration_sampling_size, least=1, whole=True
    )
    file = find_artifact(as_path(path, "tune_speed"))
    tensors = find_tensors(model)
    contents = storage.read(file, tensors.numbers)
    floats = float_forms.decoded(tensors, completed(tensors, contents))
    seen = observe.collect(floats, calib_dataloader, limit)
    copied = tensors.in_copy(floats)
    found = timed(copied, contents, seen)
    if found.profile.busy:
        log.warning("%s", BUSY)
    storage.write_beside(file, ENGINE_FILE, found.profile.to_json())
    return found.assembled(copied, contents)
