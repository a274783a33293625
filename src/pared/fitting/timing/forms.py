"""A call of a model in all of its forms, made, compared and timed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from pared.errors import reason_of
from pared.fitting.timing.steps import Step, tensors_given
from pared.model.calls import Call
from pared.model.recorded.state import Attributes
from pared.model.tensors import tensor_count
from pared.runtime.graphs.call_kinds import Bound, arguments_of, caches_of, unknown_output
from pared.runtime.graphs.containers import Container
from pared.runtime.profile.timings import CallTiming
from pared.runtime.serving.agreement import agree, lost
from pared.runtime.serving.graph_server import GraphServer
from pared.runtime.serving.openvino_server import OpenVinoServer
from pared.runtime.serving.served import forward_of
from pared.runtime.stopwatch import Spent, times_of

log = logging.getLogger(__name__)

_MOST_TENSORS: Final = 2000  # of a model of which graphs are captured, which takes about 20 ms for each
_UNKNOWN: Final = "an argument is neither a tensor nor a constant, nor holds only tensors"
_KEPT_IN_FLOAT32: Final = "an argument holds tensors, which keep their type"
_SAME: Final = 1e-3  # share of the energy that any runtime may lose
# A runtime's output may lose this many times what the modules lose, and twice that on a single sample, of which the
# losses say little: what is chosen is measured on the recorded calls, and scored, before it may answer.
_AS_FAR: Final = 1.5
_BFLOAT16_LOSS: Final = 1e-3  # share of the output's energy that bfloat16 may lose: the default damage of `fit`


@dataclass(frozen=True, eq=False)
class Forms:
    """A model in all of its forms: float32, bfloat16, quantized and run layer by layer, as graphs, and in OpenVINO."""

    float32: nn.Module
    bfloat16: Callable[..., Any] | str
    by_layers: nn.Module
    server: GraphServer
    openvino: OpenVinoServer | None  # None: it is not tried
    exact: Outputs

    def time(self, call: Call, bound: Bound | None, *, in_bfloat16: bool) -> CallTiming | None:
        """The times of one call; None if the float model raises an exception when it is made again."""
        if call.state is not None and self._is_steady(call):
            call = replace(call, state=None)  # such as tables of positions that are kept for the next call
        if bound is not None and call.state is None and caches_of(bound):
            call = Step(call.args, call.kwargs)
        reason = call.side_effects or (_UNKNOWN if bound is None else "")
        found: dict[str, Callable[[], Any] | str] = dict.fromkeys(self._others, reason)
        seen = _Seen(partial(self.exact, call), forward_of(self.by_layers))
        if bound is not None and not reason:
            found["bfloat16"] = self._in_bfloat16(call, seen) if in_bfloat16 else "it was far slower for another call"
            if any(type(one) is Container for one in bound.values()):
                found["bfloat16"] = _KEPT_IN_FLOAT32
            found["graph"] = self._as_graph("graph", call, bound, self.server, seen, seen.forward)
            if self.openvino is not None:
                modules = seen.forward if isinstance(found["graph"], str) or isinstance(call, Step) else seen.again
                found["openvino"] = self._in_openvino(call, bound, self.openvino, seen, modules)
        found |= {"float32": partial(call.on, self.float32), "modules": partial(call.on, self.by_layers)}
        times = times_of(found, {**dict.fromkeys(self._others, math.inf), **seen.warm}, in_a_row=True)
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

    def _in_bfloat16(self, call: Call, seen: _Seen) -> Callable[[], Any] | str:
        """The call in bfloat16; or why it cannot be chosen."""
        if isinstance(self.bfloat16, str):
            return self.bfloat16
        run = partial(call.on, self.bfloat16)
        try:
            with torch.no_grad():
                return (
                    run
                    if agree(seen.timed("bfloat16", run), seen.exact(), _BFLOAT16_LOSS)
                    else "it is too far from float32"
                )
        except Exception as error:  # noqa: BLE001  # whatever the model raises in bfloat16 becomes the reason
            return reason_of(error)

    @property
    def _others(self) -> tuple[str, ...]:
        """What may take the place of the modules."""
        return ("bfloat16", "graph", *(() if self.openvino is None else ("openvino",)))

    def _in_openvino(
        self, call: Call, bound: Bound, openvino: OpenVinoServer, seen: _Seen, modules: Callable[..., Any]
    ) -> Callable[[], Any] | str:
        """The call in OpenVINO; or why it cannot be chosen."""
        run = self._as_graph("openvino", call, bound, openvino, seen, modules)
        if isinstance(run, str):
            return run
        try:
            with torch.no_grad():
                theirs = call.on(partial(modules, self.by_layers))
                samples = max((len(one) for one in tensors_given(call) if one.dim()), default=1)
                most = _AS_FAR * (1 + 1 / max(samples, 1)) * max(lost(theirs, seen.exact()), _SAME)
                return (
                    run
                    if lost(seen.timed("openvino", run), seen.exact()) <= most
                    else "it is further from float32 than the modules are"
                )
        except Exception as error:  # noqa: BLE001  # as where it is made: whatever is raised becomes the reason
            return reason_of(error)

    def _as_graph(
        self, name: str, call: Call, bound: Bound, server: GraphServer, seen: _Seen, modules: Callable[..., Any]
    ) -> Callable[[], Any] | str:
        """The call as a graph that a server makes; or why there is none."""
        tensors = tensor_count(self.float32)
        if tensors > _MOST_TENSORS:
            return f"to capture one of a model of {tensors:,} tensors would take too long"

        def run() -> Any:
            return call.on(lambda *args, **kwargs: server.serve(self.by_layers, args, kwargs, modules))

        try:
            with torch.no_grad():
                if unknown := unknown_output(seen.exact()):
                    return unknown
                run()  # makes it, and compares
                answered = seen.timed(name, run) is not NotImplemented
                reason = server.reason(bound)
                return run if answered and not reason else reason
        except Exception as error:  # noqa: BLE001  # whatever torch makes of the model's code becomes the reason
            return reason_of(error)


class Outputs:
    """What the float model gives, each call made once, and how long that took.

    Args:
        model: the float model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: dict[int, tuple[Call, Any, Spent]] = {}

    def __call__(self, call: Call) -> tuple[Any, Spent]:
        """The output, and the time. Whatever the model raises is raised each time."""
        if id(call) not in self._found:
            with torch.no_grad(), (spent := Spent()).adding():
                output = call.on(self._model)
            self._found[id(call)] = call, output, spent  # the call is held, so that no other gets its number
        return self._found[id(call)][1:]


class _Seen:
    """What a call gives in float32 and by the quantized modules, so that nothing runs again only to be compared with.

    Args:
        exact: what the call gives on the float model, and how long it takes.
        modules: the forward of the quantized model.

    Attributes:
        warm: the forms that have run, each with the seconds of a run; infinite where weights were packed meanwhile.
    """

    def __init__(self, exact: Callable[[], tuple[Any, Spent]], modules: Callable[..., Any]) -> None:
        self._exact, self._modules = exact, modules
        self._output: tuple[Any] | None = None
        self.warm: dict[str, float] = {}

    def exact(self) -> Any:
        """The output in float32."""
        output, spent = self._exact()
        self.warm["float32"] = spent.seconds
        return output

    def timed(self, form: str, run: Callable[[], Any]) -> Any:
        """The output of another form."""
        with (spent := Spent()).adding():
            output = run()
        self.warm[form] = spent.seconds
        return output

    def forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Runs the modules, whatever ran before: a graph has to see what a call changes."""
        self._output = (self._modules(model, *args, **kwargs),)
        self.warm["modules"] = math.inf
        return self._output[0]

    def again(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of the modules, which a graph has already seen to change nothing if it ran."""
        return self.forward(model, *args, **kwargs) if self._output is None else self._output[0]
