"""Measured times of layers and calls, and which of their forms is fastest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final, Literal

from pared.files.checks import Place
from pared.runtime.graphs.call_kinds import Argument, describe_kind

# Anything but the default (float32, layer by layer) is used only if it takes at most this share of the default's time:
# a smaller gain is noise, or not worth the rounding.
WORTH: Final = 0.9
_WORTH_IN_DOUBT: Final = 0.5  # where several threads were timed, of which only bounds are known

# No times that are not measured but made up, in milliseconds.
_SHORTEST, _LONGEST = 1e-9, 1e12
_REASON: Final = "because"
_OPTIONAL: Final = (_REASON, "openvino_ms")  # which files of version 0.1 lack

Kernel = Literal["float32", "bfloat16", "int8"]
Form = Literal["float32", "bfloat16", "graph", "openvino"]  # what may answer calls in place of the modules
_OTHERS: Final[tuple[Form, ...]] = ("bfloat16", "openvino", "graph", "float32")
_QUANTIZED: Final = ("modules_ms", "graph_ms", "openvino_ms")
_COPIES: Final = ("float32_ms", "bfloat16_ms")  # of the weights, which take memory of their own
_FORMS: Final[dict[str, Form]] = {
    "graph_ms": "graph",
    "openvino_ms": "openvino",
    "float32_ms": "float32",
    "bfloat16_ms": "bfloat16",
}


@dataclass(frozen=True)
class Timing:
    """The measured times of one layer, in milliseconds, from an input to an output of the layer's own type.

    Args:
        shape: the shape of the input that was timed.
        float32_ms: the fastest of several runs of the float layer.
        bfloat16_ms: the same with weight and input cast to bfloat16, and the output cast back.
        int8_ms: the same in int8.
        because: why one of these was not measured, and has the time of the float layer.
    """

    shape: tuple[int, ...]
    float32_ms: float
    bfloat16_ms: float
    int8_ms: float
    because: str = ""

    @property
    def kernel(self) -> Kernel:
        """The fastest kernel if it is at least a tenth faster than float32, else float32.

        >>> Timing((1, 2), 3.0, 2.0, 2.5).kernel, Timing((1, 2), 3.0, 3.5, 2.9).kernel
        ('bfloat16', 'float32')
        """
        best: Kernel = "bfloat16" if self.bfloat16_ms < self.int8_ms else "int8"
        return best if min(self.bfloat16_ms, self.int8_ms) <= WORTH * self.float32_ms else "float32"


@dataclass(frozen=True)
class CallTiming:
    """The measured times of one call of a model or submodel, in milliseconds.

    Args:
        arguments: the call's arguments without their numbers.
        float32_ms: the fastest of several runs of the float model.
        bfloat16_ms: the same for a copy in bfloat16, with float32 inputs and outputs; None if there is none.
        modules_ms: the same for the quantized model, each layer with its own kernel; None if it raises an exception.
        graph_ms: the same for its graph; None if there is none.
        because: why there is none of these, and which sizes the graph does not take.
        openvino_ms: the same for its graph in OpenVINO; None if there is none, or OpenVINO is not installed.
    """

    arguments: tuple[Argument, ...]
    float32_ms: float
    bfloat16_ms: float | None
    modules_ms: float | None
    graph_ms: float | None
    because: str = ""
    openvino_ms: float | None = None

    @property
    def kind(self) -> str:
        """The kind of call, as text."""
        return describe_kind(self.arguments)

    def __str__(self) -> str:
        """One line, for people."""
        sizes = ", ".join(filter(None, (argument.size for argument in self.arguments)))
        times = {
            "float32": self.float32_ms,
            "bfloat16": self.bfloat16_ms,
            "quantized by layers": self.modules_ms,
            "as a graph": self.graph_ms,
            "in OpenVINO": self.openvino_ms,
        }
        shown = ", ".join(f"{name} {ms:.3g}" for name, ms in times.items() if ms is not None)
        return f"{sizes or 'a call'}: {shown} ms" + (f" ({self.because})" if self.because else "")

    def without(self, form: Form, reason: str) -> CallTiming:
        """The same without the times of a form, and why."""
        times: dict[Form, float | None] = {
            "bfloat16": self.bfloat16_ms,
            "graph": self.graph_ms,
            "openvino": self.openvino_ms,
        }
        if times.get(form) is None:  # float32 is always there: it is what the others are compared with
            return self
        times[form] = None
        because = "; ".join(filter(None, (self.because, f"no {form}: {reason}")))
        return replace(
            self,
            bfloat16_ms=times["bfloat16"],
            graph_ms=times["graph"],
            openvino_ms=times["openvino"],
            because=because,
        )

    @classmethod
    def from_json(cls, data: object, at: Place) -> CallTiming:
        """The inverse of `dataclasses.asdict`. Raises CorruptError for anything else."""
        known = at.fields(data, "a call", _required(cls), _OPTIONAL)
        given = at.sequence(known["arguments"], "the arguments of a call")
        return cls(
            arguments=tuple(Argument.from_json(one, at) for one in given),
            float32_ms=_milliseconds(known["float32_ms"], at),
            bfloat16_ms=_milliseconds_or_none(known["bfloat16_ms"], at),
            modules_ms=_milliseconds_or_none(known["modules_ms"], at),
            graph_ms=_milliseconds_or_none(known["graph_ms"], at),
            because=at.text(known.get(_REASON, ""), "a reason"),
            openvino_ms=_milliseconds_or_none(known.get("openvino_ms"), at),
        )


@dataclass(frozen=True)
class Served:
    """Calls of one kind that something other than the modules answers.

    Args:
        form: what answers them.
        example: the largest measured call of this kind.
        least: the numbers in the tensors of the smallest such call; default: a call may be as small as it likes.
        below: they are fewer than that; default: a call may be as large as it likes.
    """

    form: Form
    example: tuple[Argument, ...]
    least: float = 0.0
    below: float = math.inf


@dataclass(frozen=True)
class ModelTiming:
    """The measured calls of a model or submodel, and what they say about how it should run.

    Args:
        calls: the calls that were timed; default: none.
        because: why none was timed here although there were some; empty if that is not so.
        is_doubtful: several threads were timed while other processes had the processors, so that times are only bounds:
            what replaces the quantized modules must take at most half of their time.
    """

    calls: tuple[CallTiming, ...] = ()
    because: str = ""
    is_doubtful: bool = False

    @property
    def served(self) -> tuple[Served, ...]:
        """What answers calls in place of the modules; empty if nothing does."""
        if self.kernel == "float32":
            return ()
        found = []
        for own, example in self._by_kind:
            has_cache = any(argument.holds for call in own for argument in call.arguments)  # which no copy takes
            common = "bfloat16_ms" if self.kernel == "bfloat16" else ""
            for field, least, below in self._by_size(own, () if has_cache else _COPIES, common):
                form = _FORMS.get(field)
                found += [] if form is None else [Served(form, example, least, below)]
        return tuple(found)

    @property
    def _by_kind(self) -> list[tuple[list[CallTiming], tuple[Argument, ...]]]:
        """The calls of each kind, and the arguments of the largest."""
        found: dict[str, list[CallTiming]] = {}
        for one in self.calls:
            found.setdefault(one.kind, []).append(one)
        return [(own, max((one.arguments for one in own), key=_numbers)) for own in found.values()]

    def _by_size(
        self, own: Sequence[CallTiming], copies: Sequence[str] = (), common: str = ""
    ) -> list[tuple[str, float, float]]:
        return _by_size(own, _WORTH_IN_DOUBT if self.is_doubtful else WORTH, copies, common)

    def kinds_with(self, form: Form) -> tuple[tuple[Argument, ...], ...]:
        """The largest call of each kind of which all calls have a time in this form."""
        return tuple(example for own, example in self._by_kind if all(getattr(one, f"{form}_ms") for one in own))

    @property
    def largest_calls(self) -> tuple[tuple[Argument, ...], ...]:
        """The largest call of each kind."""
        return tuple(example for _, example in self._by_kind)

    @property
    def kernel(self) -> Kernel:
        """How the model runs: "int8" (each layer with its own kernel) if that is at least a tenth faster than float32.

        The geometric mean over the measured calls decides; int8 if none was measured, or if it is doubtful that another
        one takes half of its time.
        """
        if not self.calls or (self.is_doubtful and min(1.0, self._bfloat16) > _WORTH_IN_DOUBT * self._int8):
            return "int8"
        if min(self._int8, self._bfloat16) > WORTH:
            return "float32"
        return "int8" if self._int8 <= self._bfloat16 else "bfloat16"

    @property
    def forms(self) -> tuple[Form, ...]:
        """What answers calls in place of the modules; empty if nothing does."""
        found = {one.form for one in self.served}
        return tuple(form for form in _OTHERS if form in found)

    def without(self, form: Form, reason: str) -> ModelTiming:
        """The same without the times of a form, and why."""
        return replace(self, calls=tuple(call.without(form, reason) for call in self.calls))

    @property
    def share(self) -> float:
        """The time of the fastest form as a share of float32's; 1 if nothing was timed."""
        return min(self._int8, self._bfloat16, 1.0) if self.calls else 1.0

    @property
    def _bfloat16(self) -> float:
        """The time in bfloat16 as a share of float32's; infinite if a call has no time in bfloat16."""
        return _mean(call.bfloat16_ms / call.float32_ms if call.bfloat16_ms else math.inf for call in self.calls)

    @property
    def _int8(self) -> float:
        """The time in int8 as a share of float32's, without copies in floats for some sizes."""
        return _mean(
            (getattr(call, field) or math.inf) / call.float32_ms
            for own, _ in self._by_kind
            for field, least, below in self._by_size(own)
            for call in own
            if least <= _numbers(call.arguments) < below
        )

    def summary(self, name: str = "") -> list[str]:
        """How it runs, and the times that decided it, as lines for people.

        Args:
            name: the submodel's name; default: the lines are about the model.
        """
        if not self.calls:
            return [f"runs layer by layer: {self.because}"] if self.because else []
        forms = {
            "openvino": "in OpenVINO",
            "graph": "as a graph, each layer in its own kernel",
            "float32": "in float32, for sizes at which that is faster",
            "bfloat16": "in bfloat16, for sizes at which that is faster",
        }
        names = [forms[form] for form in self.forms]
        if self.forms == ("bfloat16",) and self.kernel == "bfloat16":
            names = ["in bfloat16"]
        elif self.forms and self.kernel == "int8" and not {"openvino", "graph"} & set(self.forms):
            names.insert(0, "layer by layer")
        chosen = {
            "int8": " or ".join(names) or "layer by layer",
            "float32": "in float32: nothing else was at least a tenth faster",
            "bfloat16": f"{' or '.join(names) or 'layer by layer'}, faster than int8; other calls layer by layer",
        }[self.kernel]
        what = f"called on its own, {name} runs" if name else "runs"
        return [f"{what} {chosen} (measured on this machine):", *(f"  {call}" for call in self.calls)]


def _required(cls: type[Timing | CallTiming]) -> list[str]:
    return [one.name for one in fields(cls) if one.name not in _OPTIONAL]


def timing_from_json(data: object, at: Place) -> Timing:
    """The inverse of `dataclasses.asdict`. Raises CorruptError for anything else."""
    known = at.fields(data, "the times of a layer", _required(Timing), [_REASON])
    times = (_milliseconds(known[name], at) for name in ("float32_ms", "bfloat16_ms", "int8_ms"))
    float32_ms, bfloat16_ms, int8_ms = times
    because = at.text(known.get(_REASON, ""), "a reason")
    return Timing(at.shape(known["shape"], "shape"), float32_ms, bfloat16_ms, int8_ms, because)


def _milliseconds(value: object, at: Place) -> float:
    ms = at.number(value, "a time")
    return ms if _SHORTEST <= ms <= _LONGEST else at.fail(f"a time is {ms:g} ms, which no clock has measured")


def _milliseconds_or_none(value: object, at: Place) -> float | None:
    return None if value is None else _milliseconds(value, at)


def _by_size(
    calls: Sequence[CallTiming], worth: float, copies: Sequence[str], common: str
) -> list[tuple[str, float, float]]:
    """The field of the form that is fastest for calls of a kind, from a size to another.

    One form for all sizes is best, as each takes memory: the `common` one, or the fastest in int8. Where another is a
    tenth faster than it, that is taken, be it one of the `copies` in floats, such as for single samples.
    """
    common = common or _fastest(calls, worth, _QUANTIZED)
    sizes: dict[int, list[CallTiming]] = {}
    for call in calls:
        sizes.setdefault(_numbers(call.arguments), []).append(call)
    found: list[tuple[str, float, float]] = []
    before = 0
    for size, own in sorted(sizes.items()):
        best = _fastest(own, worth, (*_QUANTIZED, *copies), common)
        if found and found[-1][0] == best:
            least = found.pop()[1]
        else:
            least = math.sqrt(before * size) if found else 0.0
            found[-1:] = [(field, low, least) for field, low, _ in found[-1:]]
        found.append((best, least, math.inf))
        before = size
    return found


def _fastest(calls: Sequence[CallTiming], worth: float, forms: Sequence[str], best: str = "modules_ms") -> str:
    """The field of the form that is fastest for calls, if that is worth it beside the best so far."""
    for other in forms:
        pairs = [(getattr(call, other), getattr(call, best)) for call in calls]
        ratios = [ms / than for ms, than in pairs if ms and than]
        faster = _mean(ratios) <= worth or (min(ratios, default=1.0) <= worth and max(ratios) <= 1.0)
        if len(ratios) == len(calls) and faster:
            best = other
    return best


def _mean(ratios: Iterable[float]) -> float:
    """The geometric mean; 1 if there are no ratios."""
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.mean(logarithms)) if logarithms else 1.0


def _numbers(arguments: tuple[Argument, ...]) -> int:
    return sum(math.prod(argument.shape) for argument in arguments if argument.dtype)
