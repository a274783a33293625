"""Where the outputs of two models diverge: both run on the same calls, and the outputs of their modules are compared.

The outputs of the modules of the first model are kept during one call; then the second runs on a copy of the same
arguments, and each of its outputs is compared as it is computed. So memory does not grow with the data.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.errors import ModelError
from pared.inspection.comparison.metrics import Similarity, measure
from pared.inspection.comparison.result import LayerOutput
from pared.model import calls
from pared.model.outputs import leaves_of, tensors_of
from pared.readers.memory import array_of
from pared.readers.naming import unwrapped
from pared.switches import DRAWING, WITHOUT_FAST_PATHS, in_eval_mode, random_states_kept

# The most numbers of a tensor inside the model that are compared, at places chosen once. The outputs of the whole
# model are compared in full.
_SAMPLE: Final = 1 << 16
# Noise this many dB below the largest noise, or more, does not count as a cause.
_MATTERS: Final = 30.0
# The smallest drop to report, in dB: it halves the ratio of the amplitudes.
_LEAST_DROP: Final = 6.0
_LEAST_SQNR: Final = -20.0  # in dB: anything lower counts as this
_SEED: Final = 0


@dataclass(eq=False)
class _Track:
    """How similar the inputs and outputs of one module are, over its calls so far.

    `inputs` and `first` cover only its first call within each call of the model: later the module may receive its own
    errors, as a cell that is called at every step does.
    """

    kind: str
    calls: int = 0
    output: Similarity = field(default_factory=Similarity)
    first: Similarity = field(default_factory=Similarity)
    inputs: dict[int, Similarity] = field(default_factory=dict)
    note: str = ""


def follow(
    a: nn.Module, b: nn.Module, inputs: calls.Calibration
) -> tuple[Similarity | None, tuple[LayerOutput, ...], str | None]:
    """Run two models on the same data and compare the outputs of their modules, by name.

    Args:
        a: the reference.
        b: the other model; it is called with the arguments of each call of `a`.
        inputs: see `calls.run`; a callable is given `a`.

    Returns:
        how similar the models' outputs are (None if they return no floats); the modules in the order in which they
        finish; and the name of the module at which the outputs diverge (None if there is none).

    Raises:
        CalibrationError: see `calls.run`.
        ModelError: `b` raises an exception on a call that `a` accepts.
    """
    recorder = _PairRecorder(a, b)
    with DRAWING, in_eval_mode(a, b), random_states_kept(), WITHOUT_FAST_PATHS, recorder.hooked():
        calls.run(a, inputs, limit=_EVERYTHING, name="inputs")
    layers = _with_drops(recorder.tracks, recorder.inside)
    return recorder.outputs, layers, _steepest(layers)


_EVERYTHING: Final = 1 << 62


class _PairRecorder:
    """Hooks on both models: those on A keep the outputs of its modules, those on B compare with them."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        self.a, self.b = a, b
        self.tracks: dict[str, _Track] = {}  # in the order in which modules of A finish
        self.inside: dict[str, set[str]] = {}  # the modules that each module calls, directly or not
        self.outputs: Similarity | None = None
        self._running = ""  # "A" or "B" during its call
        self._kept: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}
        self._seen: dict[str, int] = {}
        self._stack: list[str] = []
        self._entered: list[list[Tensor]] = []
        self._arguments: tuple[Any, ...] = ()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Compare all calls of A within this context."""
        with ExitStack() as hooks:
            for mark, modules in zip("AB", _by_name(self.a, self.b), strict=True):
                for name, module in modules.items():
                    hooks.callback(module.register_forward_pre_hook(self._enter(mark, name), with_kwargs=True).remove)
                    hooks.callback(module.register_forward_hook(self._leave(mark, name), with_kwargs=True).remove)
            # These two enclose the others: first on the way in, last on the way out.
            begin = self.a.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
            hooks.callback(begin.remove)
            hooks.callback(self.a.register_forward_hook(self._end).remove)
            yield

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._running:
            self._arguments = _copied((args, kwargs))
            self._start("A")

    def _end(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self._running != "A" or self._stack:
            return
        self._start("B")
        args, kwargs = self._arguments
        try:
            output_b = self.b(*args, **kwargs)
        except Exception as error:
            raise ModelError(
                f"raised {type(error).__name__} where the first model did not: {error}",
                where=f"compare: B, a {type(self.b).__name__}",
                remedy="Compare models that take the same arguments; the traceback of the cause shows where it failed.",
            ) from error
        finally:
            self._running = ""
        self._finish(output, output_b)

    def _start(self, mark: str) -> None:
        self._running = mark
        self._seen, self._stack, self._entered = {}, [], []
        random.seed(_SEED)  # both models draw the same random numbers
        np.random.seed(_SEED)  # the state that models may use
        torch.manual_seed(_SEED)

    def _finish(self, output_a: Any, output_b: Any) -> None:
        """Compare the outputs of the models, in full."""
        for name, _ in self._kept:
            self.tracks[name].note = "called more often in A"
        self._kept = {}
        a, b = ([leaf.value.detach() for leaf in leaves_of(output)] for output in (output_a, output_b))
        if a and _shapes(a) == _shapes(b):
            self.outputs = (self.outputs or Similarity()) + _similarity(a, b)

    def _enter(self, mark: str, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._running == mark:
                self._stack.append(name)
                self._entered.append(_samples((args, kwargs)))

        return hook

    def _leave(self, mark: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
            if self._running != mark:
                return
            self._stack.pop()
            call = self._seen[name] = self._seen.get(name, 0) + 1
            inputs, outputs = self._entered.pop(), _samples(output)
            if mark == "B":
                self._compare(name, call, inputs, outputs)
                return
            for outer in self._stack:
                self.inside.setdefault(outer, set()).add(name)
            if outputs:
                self.tracks.setdefault(name, _Track(type(module).__name__)).calls += 1
                self._kept[name, call] = inputs, outputs

        return hook

    def _compare(self, name: str, call: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        track, kept = self.tracks.get(name), self._kept.pop((name, call), None)
        if track is None:
            return
        if kept is None:
            track.note = "called more often in B" if outputs else track.note
            return
        inputs_a, outputs_a = kept
        if _shapes(outputs_a) != _shapes(outputs):
            shapes = [" and ".join(map(str, _shapes(side))) for side in (outputs_a, outputs)]
            track.note = f"returns {shapes[0]} in A, {shapes[1]} in B"
            return
        similarity = _similarity(outputs_a, outputs)
        track.output += similarity
        if call > 1:
            return
        track.first += similarity
        if _shapes(inputs_a) == _shapes(inputs):
            for i, (a, b) in enumerate(zip(inputs_a, inputs, strict=True)):
                track.inputs[i] = track.inputs.get(i, Similarity()) + _similarity([a], [b])


def _shapes(tensors: Sequence[Tensor]) -> list[list[int]]:
    return [list(tensor.shape) for tensor in tensors]


def _by_name(a: nn.Module, b: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The modules of both by name; if the names differ, by their names without what wrappers add."""
    modules_a, modules_b = dict(a.named_modules()), dict(b.named_modules())
    if modules_a.keys() == modules_b.keys():
        return modules_a, modules_b
    return _unwrapped(modules_a), _unwrapped(modules_b)


def _unwrapped(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The outermost module of each name."""
    outermost: dict[str, nn.Module] = {}
    for name, module in modules.items():
        outermost.setdefault(unwrapped(name), module)
    return outermost


def _copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A copy, because a model may change its arguments; what is one object stays one."""
    computed = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    own: dict[int, Any] = {id(leaf): leaf.detach().clone() for leaf in computed}  # deepcopy would refuse these
    return copy.deepcopy(arguments, own)


def _samples(value: Any) -> list[Tensor]:
    """The floating tensors among the inputs or outputs of a module; only a sample of large ones."""
    return [_sample(tensor.detach()) for tensor in tensors_of(value)]


def _sample(tensor: Tensor) -> Tensor:
    if tensor.numel() <= _SAMPLE:
        return tensor.clone()
    places = np.random.default_rng(tensor.numel()).integers(tensor.numel(), size=_SAMPLE)
    return tensor.reshape(-1)[torch.from_numpy(places).to(tensor.device)]


def _similarity(a: Sequence[Tensor], b: Sequence[Tensor]) -> Similarity:
    total = Similarity()
    for first, second in zip(a, b, strict=True):
        if not (first.is_meta or second.is_meta):
            total += measure(array_of(first), array_of(second))
    return total


def _with_drops(tracks: Mapping[str, _Track], inside: Mapping[str, set[str]]) -> tuple[LayerOutput, ...]:
    """The modules in order, with the drop of each.

    A drop is how much lower the SQNR of the output is than that of the input. Noise far below the largest one counts
    as none, so that a step from exact to almost exact is not a drop. A module whose inner modules account for at least
    half of its drop has none of its own.
    """
    layers = [
        LayerOutput(
            name,
            track.kind,
            track.calls,
            track.output if track.output.count else None,
            _input_sqnr(track),
            0.0,
            track.note,
        )
        for name, track in tracks.items()
    ]
    outputs = [layer.similarity.sqnr for layer in layers if layer.similarity is not None]
    ceiling = _bounded(min(outputs, default=0.0)) + _MATTERS
    drops = {
        name: max(0.0, min(_input_sqnr(track), ceiling) - _bounded(track.first.sqnr))
        for name, track in tracks.items()
        if track.first.count
    }
    return tuple(
        replace(layer, drop=_own(drops.get(layer.name, 0.0), inside.get(layer.name, ()), drops)) for layer in layers
    )


def _own(drop: float, inside: Iterable[str], drops: Mapping[str, float]) -> float:
    explained = max((drops.get(name, 0.0) for name in inside), default=0.0)
    return drop if explained < drop / 2 else 0.0


def _bounded(sqnr: float) -> float:
    return max(sqnr, _LEAST_SQNR) if sqnr == sqnr else _LEAST_SQNR  # NaN


def _input_sqnr(track: _Track) -> float:
    return min((similarity.sqnr for similarity in track.inputs.values()), default=float("inf"))


def _steepest(layers: Sequence[LayerOutput]) -> str | None:
    """The first module whose outputs cannot be compared; otherwise the one with the steepest drop, if it is steep."""
    misfit = next((layer.name for layer in layers if layer.similarity is None and layer.note), None)
    if misfit is not None:
        return misfit
    steepest = max(layers, key=lambda layer: layer.drop, default=None)
    return steepest.name if steepest is not None and steepest.drop >= _LEAST_DROP else None
