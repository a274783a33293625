"""What is fastest on this machine: int8, bfloat16 or float, layer by layer or as a graph. No artifact depends on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from pared.artifact.envelope import find_artifact
from pared.errors import reason_of
from pared.files.disk import as_path
from pared.fitting.calibration import observe
from pared.fitting.calibration.observe import Statistics
from pared.fitting.search.activations import find_candidates
from pared.fitting.submodels import find_submodels
from pared.fitting.timing.layers import time_layers
from pared.fitting.timing.steps import Step, has_containers, numbers_given, tensors_given
from pared.model import calls, storage
from pared.model.calls import Call
from pared.model.contents import Contents, completed
from pared.model.copies import shadow
from pared.model.recorded import values
from pared.model.recorded.state import Attributes
from pared.model.tensors import ModelTensors, ModuleT, find_tensors, tensor_count
from pared.runtime import float_forms, quantized
from pared.runtime.graphs.call_kinds import (
    Bound,
    arguments_of,
    bind,
    caches_of,
    describe_kind,
    parameters_of,
    unknown_output,
)
from pared.runtime.graphs.capturing import kept
from pared.runtime.graphs.capturing.capture import Captures
from pared.runtime.graphs.containers import Container
from pared.runtime.kernels.machine import without_bfloat16
from pared.runtime.load import check_model
from pared.runtime.openvino.graph import is_installed
from pared.runtime.profile.profile import BUSY, ENGINE_FILE, Profile
from pared.runtime.profile.timings import WORTH, CallTiming, ModelTiming
from pared.runtime.serving.bfloat16 import in_bfloat16
from pared.runtime.serving.graph_server import GraphServer, agree, lost
from pared.runtime.serving.openvino_server import OpenVinoServer
from pared.runtime.serving.served import forward_of, warm_up
from pared.runtime.stopwatch import Spent, times_of
from pared.scalars import checked_number
from pared.switches import random_states_kept

log = logging.getLogger(__name__)

_MOST_TENSORS: Final = 2000  # of a model of which graphs are captured, which takes about 20 ms for each
_MOST_KINDS: Final = 3  # of calls that are measured
_WORTH_TRYING: Final = 0.1  # the share of the layers' time in float32 from which on all are tried in int8
_UNKNOWN: Final = "an argument is neither a tensor nor a constant, nor holds only tensors"
_KEPT_IN_FLOAT32: Final = "an argument holds tensors, which keep their type"
_FAR: Final = 2  # a call this many times as large, or as slow, is far larger or slower
_LONG: Final = 0.1  # seconds of a call
_SAME: Final = 1e-3  # share of the energy by which the output of a sample may differ alone and among others
_AS_FAR: Final = 1.5  # a runtime's output may lose this many times what the modules lose
_BFLOAT16_LOSS: Final = 1e-3  # share of the output's energy that bfloat16 may lose: the default damage of `fit`


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
    with spent.adding():
        found = _fastest(tensors, contents, seen)
    return replace(found, profile=replace(found.profile, busy=spent.is_busy))


def _fastest(tensors: ModelTensors[ModuleT], contents: Contents, seen: Statistics) -> Timed:
    candidates = find_candidates(tensors.model, contents.tensors, seen.inputs)
    profile = time_layers(candidates, contents.activations)
    outright = tensors.in_copy(shadow(tensors.model))
    # In a step with a cache, which changes its arguments, no submodels can be found.
    largest = max(seen.calls, key=lambda call: (not call.side_effects, numbers_given(call)), default=None)
    submodels = find_submodels(outright.model, largest) if largest is not None else {}
    whole = Captures(make=kept.captured)
    captures = {"": whole, **{name: Captures(whole) for name in submodels}}
    best = _timed(outright, contents, profile, seen.calls, submodels, captures)
    has_graphs = bool(submodels) or any(call.graph_ms for call in best.model.calls)
    if has_graphs and "openvino" not in best.model.forms and _left(profile) >= _WORTH_TRYING:
        # A layer that is slower on its own may be faster where a graph joins it with its neighbours.
        together = _timed(outright, contents, replace(profile, together=True), seen.calls, submodels, captures)
        if together.model.kernel == "int8" and together.model.share <= WORTH * best.model.share:
            best = together
    return Timed(best, captures)


def _left(profile: Profile) -> float:
    """The share of the layers' time in float32 that those take which are not fastest in int8."""
    total = sum(timing.float32_ms for timing in profile.layers.values())
    left = sum(timing.float32_ms for timing in profile.layers.values() if timing.kernel != "int8")
    return left / total if total else 0.0


def _timed(
    tensors: ModelTensors[nn.Module],
    contents: Contents,
    profile: Profile,
    calls: Sequence[Call],
    submodels: Mapping[str, Call],
    captures: Mapping[str, Captures],
) -> Profile:
    """The profile with the times of the submodels, and then of the model in which the fastest of these run."""
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
    return replace(profile, model=ModelTiming(time_calls(model, by_layers, calls, captures[""], whole=True)))


def time_calls(
    model: nn.Module, by_layers: nn.Module, calls: Sequence[Call], captures: Captures, *, whole: bool = False
) -> tuple[CallTiming, ...]:
    """Time a model, or a submodel, in all of its forms.

    Args:
        model: the float model or submodel, in eval mode.
        by_layers: the same, quantized, and run layer by layer.
        calls: the calls that calibration made. Of each kind the largest, the smallest and the first sample of the
            smallest are made again. bfloat16 is given up if the first call is far slower in it.
        captures: the graphs captured so far of this architecture.
        whole: whether it is a whole model, whose codes are known to other runtimes.

    Returns:
        the times of the calls that can be made again. A form that raises an exception has no time.
    """
    names = parameters_of(model)
    found = chosen(calls, names, partial(_is_part, model))
    bound = [bind(names, call.args, call.kwargs) for call in found]
    kinds = {describe_kind(arguments_of(b)): arguments_of(b) for b in reversed(bound) if b is not None}
    # A graph for each call kind, of its largest call.
    server = GraphServer(float_forms.outline_of, list(kinds.values()), captures)
    openvino = None
    if whole and is_installed():
        openvino = OpenVinoServer(float_forms.outline_of, list(kinds.values()), captures)
    forms = _Forms(model, _copied_to_bfloat16(model), by_layers, server, openvino)
    times: list[CallTiming] = []
    for call, arguments in zip(found, bound, strict=True):
        timing = forms.time(call, arguments, in_bfloat16=not times or not _is_hopeless(times[0]))
        times += [] if timing is None else [timing]
    return tuple(times)


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


def chosen(calls: Sequence[Call], names: Sequence[str], is_part: Callable[[Call, Call], bool]) -> list[Call]:
    """The calls that are timed: of each kind the largest, the smallest if it is far smaller, and a single sample.

    Args:
        calls: the calls that calibration made.
        names: the names of the parameters of the model's `forward`.
        is_part: whether a call with a single sample of another one gives that sample's output.
    """
    kinds: dict[object, list[Call]] = {}
    for call in calls:
        bound = bind(names, call.args, call.kwargs)
        kinds.setdefault(None if bound is None else describe_kind(arguments_of(bound)), []).append(call)
    found = []
    for same in list(kinds.values())[:_MOST_KINDS]:
        largest, smallest = max(same, key=numbers_given), min(same, key=numbers_given)
        found += [largest, *([smallest] if _FAR * numbers_given(smallest) < numbers_given(largest) else [])]
        found += [single for single in _single(smallest) if is_part(single, smallest)]
    return found


def _is_part(model: nn.Module, single: Call, whole: Call) -> bool:
    """Whether a model takes a single sample, and gives for it what it gives for that sample among the others.

    The first dimension of an input need not count samples, and a model may be made for a batch of a fixed size. Where a
    single sample takes long, what comes with each call hardly counts, and the other calls say what is fastest.
    """
    count = len(tensors_given(whole)[0])

    def equal(alone: Tensor, among: Tensor) -> bool:
        return agree(alone, among[:1] if among.dim() and len(among) == count else among, _SAME)

    try:
        with torch.no_grad():
            with (spent := Spent()).adding():
                alone = single.on(model)
            return spent.seconds < _LONG and values.same(alone, whole.on(model), equal)
    except Exception as error:  # noqa: BLE001  # nobody asked for this call
        log.debug("a single sample is not timed: %s", reason_of(error))
        return False


def _single(call: Call) -> list[Call]:
    """A call with only the first sample, if all tensors of the call have the same number of samples, two or more."""
    tensors = tensors_given(call)
    if call.side_effects or has_containers(call) or not tensors or any(tensor.dim() < 2 for tensor in tensors):
        return []
    if len(set(map(len, tensors))) != 1 or len(tensors[0]) < 2:
        return []

    def first(value: object) -> object:
        return value[:1] if isinstance(value, Tensor) else value

    return [Call(tuple(map(first, call.args)), {name: first(value) for name, value in call.kwargs.items()})]


@dataclass(frozen=True, eq=False)
class _Forms:
    """A model in all of its forms: float32, bfloat16, quantized and run layer by layer, as graphs, and in OpenVINO."""

    float32: nn.Module
    bfloat16: Callable[..., Any] | str
    by_layers: nn.Module
    server: GraphServer
    openvino: OpenVinoServer | None  # None: it is not tried

    def time(self, call: Call, bound: Bound | None, *, in_bfloat16: bool) -> CallTiming | None:
        """The times of one call; None if the float model raises an exception when it is made again."""
        if call.state is not None and self._is_steady(call):
            call = replace(call, state=None)  # such as tables of positions that are kept for the next call
        if bound is not None and call.state is None and caches_of(bound):
            call = Step(call.args, call.kwargs)
        reason = call.side_effects or (_UNKNOWN if bound is None else "")
        found: dict[str, Callable[[], Any] | str] = dict.fromkeys(self._others, reason)
        if bound is not None and not reason:
            found["bfloat16"] = self._in_bfloat16(call) if in_bfloat16 else "it was far slower for another call"
            if any(type(one) is Container for one in bound.values()):
                found["bfloat16"] = _KEPT_IN_FLOAT32
            found["graph"] = self._as_graph(call, bound, self.server)
            if self.openvino is not None:
                found["openvino"] = self._in_openvino(call, bound, self.openvino)
        found |= {"float32": partial(call.on, self.float32), "modules": partial(call.on, self.by_layers)}
        times = times_of(found)
        if times is None:
            log.info("a call is not timed, as it cannot be made again: %s", found["float32"])
            return None
        note = self.server.note(bound) if bound is not None and "graph" in times else ""
        notes = [f"as a graph, {note}"] if note else []
        return CallTiming(
            () if bound is None else arguments_of(bound),
            times["float32"],
            times.get("bfloat16"),
            times.get("modules"),
            times.get("graph"),
            "; ".join([*(f"no {name}: {form}" for name, form in found.items() if isinstance(form, str)), *notes]),
            times.get("openvino"),
        )

    def _is_steady(self, call: Call) -> bool:
        """Whether a call changes nothing in the model if another came before, and the two give the same."""
        assert call.state is not None
        bare = replace(call, state=None)
        try:
            with torch.no_grad(), call.state.within(self.float32):
                first = bare.on(self.float32)
                second, name = Attributes(self.float32.modules()).changed_by(partial(bare.on, self.float32))
        except Exception as error:  # noqa: BLE001  # a second call may be more than the model takes
            log.debug("the model's state decides: %s", reason_of(error))
            return False
        with torch.no_grad():
            return not name and agree(first, second, 0.0) and agree(first, bare.on(self.float32), 0.0)

    def _in_bfloat16(self, call: Call) -> Callable[[], Any] | str:
        """The call in bfloat16; or why it cannot be chosen."""
        if isinstance(self.bfloat16, str):
            return self.bfloat16
        run = partial(call.on, self.bfloat16)
        try:
            with torch.no_grad():
                return run if agree(run(), call.on(self.float32), _BFLOAT16_LOSS) else "it is too far from float32"
        except Exception as error:  # noqa: BLE001  # whatever the model raises in bfloat16 becomes the reason
            return reason_of(error)

    @property
    def _others(self) -> tuple[str, ...]:
        """What may take the place of the modules."""
        return ("bfloat16", "graph", *(() if self.openvino is None else ("openvino",)))

    def _in_openvino(self, call: Call, bound: Bound, openvino: OpenVinoServer) -> Callable[[], Any] | str:
        """The call in OpenVINO; or why it cannot be chosen."""
        run = self._as_graph(call, bound, openvino)
        if isinstance(run, str):
            return run
        try:
            with torch.no_grad():
                exact = call.on(self.float32)
                most = _AS_FAR * max(lost(call.on(self.by_layers), exact), _SAME)
                return run if lost(run(), exact) <= most else "it is further from float32 than the modules are"
        except Exception as error:  # noqa: BLE001  # as where it is made: whatever is raised becomes the reason
            return reason_of(error)

    def _as_graph(self, call: Call, bound: Bound, server: GraphServer) -> Callable[[], Any] | str:
        """The call as a graph that a server makes; or why there is none."""
        tensors = tensor_count(self.float32)
        if tensors > _MOST_TENSORS:
            return f"to capture one of a model of {tensors:,} tensors would take too long"
        modules = forward_of(self.by_layers)

        def run() -> Any:
            return call.on(lambda *args, **kwargs: server.serve(self.by_layers, args, kwargs, modules))

        try:
            with torch.no_grad():
                if unknown := unknown_output(call.on(self.float32)):
                    return unknown
                run()  # makes it, and compares
                answered = run() is not NotImplemented
                reason = server.reason(bound)
                return run if answered and not reason else reason
        except Exception as error:  # noqa: BLE001  # whatever torch makes of the model's code becomes the reason
            return reason_of(error)


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
