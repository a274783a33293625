"""Where two models part: both run on the same calls, and the output of each module is compared with its counterpart's.

The first model runs and its modules' outputs are kept for the length of one call; then the second runs on a copy of
the same arguments, and each of its outputs is compared as it comes. So nothing grows with the data.
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
from pared.inspection.comparison.sources import array_of
from pared.model import calls
from pared.model.outputs import leaves_of, tensors_of
from pared.readers.naming import unwrapped
from pared.switches import DRAWING, WITHOUT_FAST_PATHS

# Of larger tensors within the model so many numbers are compared, at places chosen once. Outputs of the whole model
# are compared in full.
_SAMPLE: Final = 1 << 16
# Noise counts as a cause where it is at least this share of the greatest there is, in dB below it.
_MATTERS: Final = 30.0
# The least drop that is worth a mark, in dB: half of the amplitude of the signal to noise ratio.
_LEAST_DROP: Final = 6.0
_LEAST_SQNR: Final = -20.0  # less is no worse
_SEED: Final = 0


@dataclass(eq=False)
class _Track:
    """What is known of one module, over its calls so far.

    Its inputs, and the output that they are held against, are those of its first call within each call of the model:
    a cell that is called at every step, or a module that is used again, is given its own errors later.
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
    """Run two models on the same data and compare what their modules give, by name.

    Args:
        a: the reference.
        b: is called with what `a` was called with.
        inputs: see `calls.run`; the callable is given `a`.

    Returns:
        how alike the models' outputs are, None if they return no floats; the modules in the order in which they
        finish; and the name of the one at which the models part, None if there is none.

    Raises:
        CalibrationError: see `calls.run`.
        ModelError: `b` raises on a call that `a` has served.
    """
    pursuit = _Pursuit(a, b)
    with DRAWING, _as_they_were(a, b), WITHOUT_FAST_PATHS, pursuit.hooked():
        calls.run(a, inputs, limit=_EVERYTHING, name="inputs")
    layers = _with_drops(pursuit.tracks, pursuit.inside)
    return pursuit.outputs, layers, _parting(layers)


_EVERYTHING: Final = 1 << 62


@contextmanager
def _as_they_were(*models: nn.Module) -> Iterator[None]:
    """Both in eval mode; training flags and the state of random numbers are put back in the end."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    drawn = random.getstate(), np.random.get_state()  # the state that models may use
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            for model in models:
                model.eval()
            yield
    finally:
        for module, training in flags:
            module.training = training
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])


class _Pursuit:
    """Hooks on both models: those on A keep what its modules give, those on B compare it."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        self.a, self.b = a, b
        self.tracks: dict[str, _Track] = {}  # in the order in which modules of A finish
        self.inside: dict[str, set[str]] = {}  # the modules that each calls, and those that these call
        self.outputs: Similarity | None = None
        self._running = ""  # which of both is
        self._kept: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}
        self._seen: dict[str, int] = {}
        self._stack: list[str] = []
        self._entered: list[list[Tensor]] = []
        self._arguments: tuple[Any, ...] = ()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Follow all calls of A for as long as this lasts."""
        with ExitStack() as hooks:
            for mark, modules in zip("AB", _by_name(self.a, self.b), strict=True):
                for name, module in modules.items():
                    hooks.callback(module.register_forward_pre_hook(self._enter(mark, name), with_kwargs=True).remove)
                    hooks.callback(module.register_forward_hook(self._leave(mark, name), with_kwargs=True).remove)
            # The outermost: before all others on the way in, behind all others on the way out.
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
            other = self.b(*args, **kwargs)
        except Exception as error:
            raise ModelError(
                f"raised {type(error).__name__} where the first model did not: {error}",
                where=f"compare: B, a {type(self.b).__name__}",
                remedy="Compare models that take the same arguments; the traceback above shows where it stopped.",
            ) from error
        finally:
            self._running = ""
        self._finish(output, other)

    def _start(self, mark: str) -> None:
        self._running = mark
        self._seen, self._stack, self._entered = {}, [], []
        _seed()

    def _finish(self, output: Any, other: Any) -> None:
        """Compare what the models returned, in full."""
        for name, _ in self._kept:
            self.tracks[name].note = "called more often in A"
        self._kept = {}
        ones, others = ([leaf.value.detach() for leaf in leaves_of(value)] for value in (output, other))
        if ones and [one.shape for one in ones] == [one.shape for one in others]:
            self.outputs = (self.outputs or Similarity()) + _similarity(ones, others)

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
            given, samples = self._entered.pop(), _samples(output)
            if mark == "B":
                self._compare(name, call, given, samples)
                return
            for outer in self._stack:
                self.inside.setdefault(outer, set()).add(name)
            if samples:
                self.tracks.setdefault(name, _Track(type(module).__name__)).calls += 1
                self._kept[name, call] = given, samples

        return hook

    def _compare(self, name: str, call: int, given: Sequence[Tensor], samples: Sequence[Tensor]) -> None:
        track, kept = self.tracks.get(name), self._kept.pop((name, call), None)
        if track is None:
            return
        if kept is None:
            track.note = "called more often in B" if samples else track.note
            return
        before, after = kept
        if [one.shape for one in after] != [one.shape for one in samples]:
            shapes = [" and ".join(str(list(one.shape)) for one in side) for side in (after, samples)]
            track.note = f"gives {shapes[0]} in A, {shapes[1]} in B"
            return
        found = _similarity(after, samples)
        track.output += found
        if call > 1:
            return
        track.first += found
        if [one.shape for one in before] == [one.shape for one in given]:
            for i, (one, other) in enumerate(zip(before, given, strict=True)):
                track.inputs[i] = track.inputs.get(i, Similarity()) + _similarity([one], [other])


def _by_name(a: nn.Module, b: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The modules of both; where names differ, by their names without what wrappers add, the outermost of a name."""
    one, other = dict(a.named_modules()), dict(b.named_modules())
    if one.keys() == other.keys():
        return one, other
    found: list[dict[str, nn.Module]] = [{}, {}]
    for modules, kept in zip((one, other), found, strict=True):
        for name, module in modules.items():
            kept.setdefault(unwrapped(name), module)
    return found[0], found[1]


def _copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments that a model may change; what is one object stays one."""
    computed = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    own: dict[int, Any] = {id(leaf): leaf.detach().clone() for leaf in computed}  # deepcopy would refuse these
    return copy.deepcopy(arguments, own)


def _seed() -> None:
    """Both models draw the same random numbers, if they draw any."""
    random.seed(_SEED)
    np.random.seed(_SEED)  # the state that models may use
    torch.manual_seed(_SEED)


def _samples(value: Any) -> list[Tensor]:
    """The floating tensors in what a module was given or gave; of large ones as many numbers as are compared."""
    return [_sample(tensor.detach()) for tensor in tensors_of(value)]


def _sample(tensor: Tensor) -> Tensor:
    if tensor.numel() <= _SAMPLE:
        return tensor.clone()
    places = np.random.default_rng(tensor.numel()).integers(tensor.numel(), size=_SAMPLE)
    return tensor.reshape(-1)[torch.from_numpy(places).to(tensor.device)]


def _similarity(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Similarity:
    found = Similarity()
    for one, other in zip(ones, others, strict=True):
        x, y = array_of(one), array_of(other)
        if x is not None and y is not None:
            found += measure(x, y)
    return found


# --- what it means


def _with_drops(tracks: Mapping[str, _Track], inside: Mapping[str, set[str]]) -> tuple[LayerOutput, ...]:
    """The modules in order, with the drop of each.

    A drop is what the SQNR of the output is less than that of the input. Noise that is far below the worst there is
    counts as none: where one model is exact before the point and the other is not, the difference is no drop. Of a
    module whose parts were called, only what they do not explain is its own.
    """
    layers = [
        LayerOutput(name, track.kind, track.calls, _or_none(track), _input(track), 0.0, track.note)
        for name, track in tracks.items()
    ]
    outputs = [layer.similarity.sqnr for layer in layers if layer.similarity is not None]
    ceiling = _bounded(min(outputs, default=0.0)) + _MATTERS
    drops = {
        name: max(0.0, min(_input(track), ceiling) - _bounded(track.first.sqnr))
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


def _or_none(track: _Track) -> Similarity | None:
    return track.output if track.output.count else None


def _input(track: _Track) -> float:
    return min((one.sqnr for one in track.inputs.values()), default=float("inf"))


def _parting(layers: Sequence[LayerOutput]) -> str | None:
    """The first module with the steepest drop, if any is steep; one that gives another shape comes before that."""
    misfit = next((layer.name for layer in layers if layer.similarity is None and layer.note), None)
    if misfit is not None:
        return misfit
    steepest = max(layers, key=lambda layer: layer.drop, default=None)
    return steepest.name if steepest is not None and steepest.drop >= _LEAST_DROP else None
