"""What is fastest on this machine: kernels of layers, graph or modules, int8 or float. No file depends on it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.artifact.envelope import find_artifact
from pared.files.disk import as_path
from pared.fitting import speed
from pared.fitting.calibration import observe
from pared.fitting.calibration.observe import Statistics
from pared.fitting.search.activations import Candidate, find_candidates
from pared.fitting.submodels import find_submodels
from pared.formats.activation import Activation
from pared.model import calls, storage
from pared.model.calls import Call
from pared.model.contents import Contents, completed
from pared.model.copies import shadow
from pared.runtime import quantized
from pared.runtime.graphs.call_kinds import Bound, arguments_of, bind, describe_kind, parameters_of
from pared.runtime.graphs.capture import Captures
from pared.runtime.kernels.outliers import columns_of
from pared.runtime.load import check_model
from pared.runtime.profile import ENGINE_FILE, WORTH, CallTiming, Kernel, ModelTiming, Profile, Timing, this_machine
from pared.runtime.record import record_of
from pared.runtime.serving.bfloat16 import in_bfloat16
from pared.runtime.serving.served import forward_of
from pared.runtime.serving.server import Server, agree
from pared.runtime.stopwatch import fastest_ms
from pared.scalars import checked_number

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_MOST_KINDS: Final = 3  # of calls that are measured
_WORTH_TRYING: Final = 0.1  # of the layers' time has to be in float32 for them to be tried all in int8
_UNKNOWN: Final = "an argument is neither a tensor nor a constant"
_FAR: Final = 2  # times as large, or as slow
_HALF_LOSS: Final = 1e-3  # of the output's energy: as much as `fit` loses unasked


def tuned(model: ModuleT, contents: Contents, seen: Statistics) -> ModuleT:
    """The quantized model, with what was measured to be fastest here.

    Args:
        model: the float model; it is left as it is.
        contents: of the artifact.
        seen: of calibration: its calls are made again.
    """
    candidates = find_candidates(model, contents.tensors, seen.inputs)
    profile = time_layers(candidates, contents.activations)
    outright = shadow(model)
    largest = max(seen.calls, key=_numbers, default=None)
    submodels = find_submodels(outright, largest) if largest is not None else {}
    captures = {name: Captures() for name in ("", *submodels)}
    best = _timed(outright, contents, profile, seen.calls, submodels, captures)
    if _left(profile) >= _WORTH_TRYING:
        # A layer that is slower by itself may be faster where a graph joins it with its neighbours.
        together = _timed(outright, contents, replace(profile, together=True), seen.calls, submodels, captures)
        if together.model.kernel == "int8" and together.model.share <= WORTH * best.model.share:
            best = together
    return quantized.assemble(model, contents, best)


def _left(profile: Profile) -> float:
    """The share of the layers' time, in float32, of those that are not fastest in int8."""
    total = sum(timing.float32_ms for timing in profile.layers.values())
    left = sum(timing.float32_ms for timing in profile.layers.values() if timing.kernel != "int8")
    return left / total if total else 0.0


def _timed(
    model: nn.Module,
    contents: Contents,
    profile: Profile,
    calls: Sequence[Call],
    submodels: Mapping[str, Call],
    captures: Mapping[str, Captures],
) -> Profile:
    """The profile with the times of the submodels, and then those of the model, which contains them."""
    by_layers = quantized.assemble(model, contents, profile)
    if submodels:
        times = {
            name: ModelTiming(
                time_calls(model.get_submodule(name), by_layers.get_submodule(name), [call], captures[name])
            )
            for name, call in submodels.items()
        }
        profile = replace(profile, submodels={name: timing for name, timing in times.items() if timing.is_served})
        by_layers = quantized.assemble(model, contents, profile)
    return replace(profile, model=ModelTiming(time_calls(model, by_layers, calls, captures[""])))


def time_calls(
    model: nn.Module, by_layers: nn.Module, calls: Sequence[Call], captures: Captures
) -> tuple[CallTiming, ...]:
    """Time a model, or a part of one, in all of its forms.

    Args:
        model: the float model in eval mode, or a part of it.
        by_layers: the same, quantized, without a graph of its own.
        calls: that calibration made; of each call kind the largest and the smallest are made again, and the
            first sample of that by itself. bfloat16 is no choice if the first of them is far slower in it.
        captures: of its architecture.
    """
    names = parameters_of(model)
    found = chosen(calls, names)
    bound = [bind(names, call.args, call.kwargs) for call in found]
    kinds = {describe_kind(arguments_of(one)): arguments_of(one) for one in reversed(bound) if one is not None}
    server = Server(
        quantized.outline_of, list(kinds.values()), captures
    )  # a graph for each call kind, of its largest call
    forms = _Forms(model, in_bfloat16(model), by_layers, server)
    times: list[CallTiming] = []
    for call, one in zip(found, bound, strict=True):
        times.append(forms.time(call, one, in_bfloat16=not times or not _is_hopeless(times[0])))
    return tuple(times)


def _is_hopeless(timing: CallTiming) -> bool:
    """Whether bfloat16 was so slow that it need not be tried again."""
    return timing.bfloat16_ms is not None and timing.bfloat16_ms > _FAR * min(timing.float32_ms, timing.modules_ms)


def chosen(calls: Sequence[Call], names: Sequence[str]) -> list[Call]:
    """The calls that are timed: of each call kind the largest, the smallest if far smaller, a single sample."""
    kinds: dict[object, list[Call]] = {}
    for call in calls:
        bound = bind(names, call.args, call.kwargs)
        kinds.setdefault(None if bound is None else describe_kind(arguments_of(bound)), []).append(call)
    found = []
    for same in list(kinds.values())[:_MOST_KINDS]:
        largest, smallest = max(same, key=_numbers), min(same, key=_numbers)
        found += [largest, *([smallest] if _FAR * _numbers(smallest) < _numbers(largest) else []), *_single(smallest)]
    return found


def _numbers(call: Call) -> int:
    return sum(one.numel() for one in (*call.args, *call.kwargs.values()) if isinstance(one, Tensor))


def _single(call: Call) -> list[Call]:
    """The first sample of a call, if all of its tensors count as many, and something in each."""
    tensors = [one for one in (*call.args, *call.kwargs.values()) if isinstance(one, Tensor)]
    if any(one.dim() < 2 for one in tensors) or len({len(one) for one in tensors}) != 1 or len(tensors[0]) < 2:
        return []

    def first(value: object) -> object:
        return value[:1] if isinstance(value, Tensor) else value

    return [Call(tuple(map(first, call.args)), {name: first(value) for name, value in call.kwargs.items()})]


@dataclass(frozen=True, eq=False)
class _Forms:
    """A model in all of its forms: in float32, in bfloat16, by layers, and as graphs."""

    float32: nn.Module
    bfloat16: Callable[..., Any]
    by_layers: nn.Module
    server: Server

    def time(self, call: Call, bound: Bound | None, *, in_bfloat16: bool) -> CallTiming:
        found: dict[str, Callable[[], Any] | str] = dict.fromkeys(("bfloat16", "graph"), _UNKNOWN)
        if bound is not None:
            found["bfloat16"] = self._in_bfloat16(call) if in_bfloat16 else "it was far slower for another call"
            found["graph"] = self._as_graph(call, bound)
        forms = {name: form for name, form in found.items() if not isinstance(form, str)} | {
            "float32": partial(self.float32, *call.args, **call.kwargs),
            "modules": partial(self.by_layers, *call.args, **call.kwargs),
        }
        times = fastest_ms(forms)
        return CallTiming(
            () if bound is None else arguments_of(bound),
            times["float32"],
            times.get("bfloat16"),
            times["modules"],
            times.get("graph"),
            "; ".join(f"no {name}: {form}" for name, form in found.items() if isinstance(form, str)),
        )

    def _in_bfloat16(self, call: Call) -> Callable[[], Any] | str:
        """The call in bfloat16; or why it is no choice."""
        run = partial(self.bfloat16, *call.args, **call.kwargs)
        with torch.inference_mode():
            expected = self.float32(*call.args, **call.kwargs)
            try:
                found = run()
            except Exception as error:  # noqa: BLE001  # whatever the model raises in another type is told as the reason
                return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return run if agree(found, expected, _HALF_LOSS) else "it is too far from float32"

    def _as_graph(self, call: Call, bound: Bound) -> Callable[[], Any] | str:
        """The call as a graph; or why there is none."""
        modules = forward_of(self.by_layers)
        run = partial(self.server.serve, self.by_layers, call.args, dict(call.kwargs), modules)
        with torch.inference_mode():
            run()  # makes it, and compares
            return self.server.reason(bound) if run() is NotImplemented else run


def kept(old: nn.Module, new: ModuleT) -> ModuleT:
    """A newly assembled model with what is known of an old one."""
    known, record = record_of(old), record_of(new)
    record.outcome, record.curve = known.outcome, known.curve
    return new


_KERNELS: Final[tuple[Kernel, ...]] = ("bfloat16", "int8")


def time_layers(candidates: Sequence[Candidate], activations: Mapping[str, Activation]) -> Profile:
    """Measure each module in float32, bfloat16 and int8 on a call that calibration saw; equal ones only once."""
    timings: dict[str, Timing] = {}
    known: dict[object, Timing] = {}
    for candidate in candidates:
        activation, seen = activations.get(candidate.name), candidate.inputs
        if activation is None or activation.mode == "gather" or seen is None or candidate.layer.missing():
            continue
        dtype = next(iter(candidate.weights.values())).coded.dtype
        shapes = () if seen.call is None else tuple(_shape(x) for x in tree_leaves((seen.call.args, seen.call.kwargs)))
        own = tuple(tuple(one.shape) for one in (*candidate.module.parameters(), *candidate.module.buffers()))
        key = (
            type(candidate.module),
            repr(candidate.module),
            own,
            seen.shape,
            shapes,
            dtype,
            activation.mode,
            len(columns_of(activation.outliers)),
        )
        if key not in known:
            forms: dict[Kernel, nn.Module] = {"float32": candidate.decoded()}
            forms |= {kernel: candidate.counterpart(activation, kernel) for kernel in _KERNELS}
            known[key] = measure(forms, seen.shape, dtype, seen.call)
        timings |= dict.fromkeys(candidate.activations(activation), known[key])
    return Profile(this_machine(), timings)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


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
    forms = {kernel: functools.partial(layer, *call.args, **call.kwargs) for kernel, layer in layers.items()}
    times = fastest_ms(forms)
    return Timing(shape, *(times[kernel] for kernel in ("float32", "bfloat16", "int8")))


def tune_speed(
    path: str | Path, model: ModuleT, calib_dataloader: calls.Calibration, *, calibration_sampling_size: int = 100
) -> ModuleT:
    """Measure anew what is fastest on this machine, and write it to `engine.json`; the artifact stays as it is.

    `fit` does this by itself. It is worth repeating on another machine, with other threads, or where calls are of other
    sizes than those that `fit` saw.

    Args:
        path: the directory that `save` wrote, or the artifact itself.
        model: the architecture, as for `load`.
        calib_dataloader: calls of the sizes that matter, as for `fit`; their numbers decide nothing.
        calibration_sampling_size: how many samples are read.

    Returns:
        the quantized model, as `load` gives it from now on.

    Raises:
        ParedError: as `load`, and as `fit` for the calibration data.
    """
    check_model(model, "pared.tune_speed")
    limit = checked_number(
        "pared.tune_speed", "calibration_sampling_size", calibration_sampling_size, least=1, whole=True
    )
    file = find_artifact(as_path(path, "tune_speed"))
    contents = storage.read(file)
    floats = quantized.decoded(model, completed(model, contents))
    seen = observe.collect(floats, calib_dataloader, limit)
    found: ModuleT = speed.tuned(floats, contents, seen)
    storage.write_beside(file, ENGINE_FILE, record_of(found).profile.to_json())
    return found
