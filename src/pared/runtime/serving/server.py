"""Which calls of a quantized model something else than its modules answers: a graph, or a copy in bfloat16."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_flatten, tree_leaves

from pared.errors import ModelError
from pared.runtime.graphs.call_kinds import Argument, Bound, arguments_of, bind, kind_of, parameters_of, tensors_of
from pared.runtime.graphs.capture import Captured, capture
from pared.runtime.graphs.graph import Graph
from pared.runtime.layers.counterpart import Counterpart, is_ordinary_call

log = logging.getLogger(__name__)

# The share of the output's energy in which a graph and the modules may differ: joined operators round elsewhere, and
# one code more or less grows on the way. What is wrong differs by far more.
_TOLERANCE: Final = 1e-2

# Ways of calling that differ from a known one in constants, and get a graph: each costs seconds.
_MOST_OTHERS: Final = 2

Skeleton = Callable[[nn.Module], nn.Module]
Capture = Callable[[nn.Module, Sequence[Argument]], Captured]
Args = tuple[Any, ...]


class Server:
    """The graphs of a model, each made at the first call that it serves.

    A call with the same tensors and other constants, as another caller's flags, has a graph of its own, as long as
    these are few. At the first call of each, and at the first with other dimensions of size 1, the modules run as well,
    and a graph that does not give what they give is dropped.

    Args:
        skeleton: gives a float model of the same architecture and class, whose numbers are not read.
        wanted: an example call for every call kind that is to be served.
        captured: how a float model's call becomes a graph.
    """

    def __init__(
        self, skeleton: Skeleton, wanted: Sequence[Sequence[Argument]] = (), captured: Capture = capture
    ) -> None:
        self._skeleton, self._captured = skeleton, captured
        self.wanted = tuple(tuple(arguments) for arguments in wanted)
        self._kinds: dict[tuple[object, ...], tuple[Argument, ...]] = {
            tuple(one.kind for one in arguments): arguments for arguments in self.wanted
        }
        self._tensors = {tensors_of(kind) for kind in self._kinds}
        self._graphs: dict[object, _Served] = {}
        self._lock = threading.RLock()
        self._names: tuple[str, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Server:
        """A copied model makes its own: a graph refers to the tensors of one."""
        return type(self)(self._skeleton, self.wanted)

    def serve(self, model: nn.Module, args: Args, kwargs: dict[str, Any], modules: Callable[..., Any]) -> Any:
        """What the model returns for a call; NotImplemented if the modules have to answer.

        Args:
            model: the quantized model.
            args: of the call.
            kwargs: of the call.
            modules: its own forward.
        """
        bound = self._bound(model, args, kwargs)
        return NotImplemented if bound is None else self._answer(model, bound, args, kwargs, modules)

    def _bound(self, model: nn.Module, args: Args, kwargs: dict[str, Any]) -> Bound | None:
        """The call's arguments, if it is one to be answered."""
        if not self._kinds or not is_ordinary_call() or torch.is_autocast_enabled("cpu"):
            return None
        if self._names is None:
            self._names = parameters_of(model)
        bound = bind(self._names, args, kwargs)
        if bound is None or tensors_of(kind_of(bound)) not in self._tensors or wants_gradients(model, bound):
            return None
        return bound

    def _answer(
        self, model: nn.Module, bound: Bound, args: Args, kwargs: dict[str, Any], modules: Callable[..., Any]
    ) -> Any:
        kind = kind_of(bound)
        served = self._graphs.get(kind)
        if served is None and kind not in self._kinds and len(self._graphs) >= len(self._kinds) + _MOST_OTHERS:
            return NotImplemented
        if served is None or not served.is_current():
            if has_listeners(model):
                return NotImplemented  # nor is a graph made: they would be called with what has no numbers
            served = self._made(model, kind, self._kinds.get(kind) or arguments_of(bound))
        return served.run(bound, lambda: modules(model, *args, **kwargs))

    def _made(self, model: nn.Module, kind: object, arguments: Sequence[Argument]) -> _Served:
        with self._lock:
            found = self._graphs.get(kind)
            if found is None or not found.is_current():
                found = self._graphs[kind] = _Served(model, lambda: self._captured(self._skeleton(model), arguments))
        return found

    def reason(self, bound: Bound) -> str:
        """Why no graph serves a call that one should, in words; empty if one does."""
        served = self._graphs.get(kind_of(bound))
        return "a module inside has hooks" if served is None else served.reason


class _Served:
    """A graph beside the modules that it stands for; without a graph, and with a reason, if there can be none."""

    def __init__(self, model: nn.Module, captured: Callable[[], Captured]) -> None:
        self.graph: Graph | None = None
        self.reason = ""
        self._watch = ModelSnapshot(model)
        self._checked: set[tuple[bool, ...]] = set()
        self._lock = threading.Lock()
        try:
            self.graph = Graph(model, captured())
        except ModelError as error:
            self.reason = error.what

    def is_current(self) -> bool:
        return self.graph is None or self._watch.is_current()

    def run(self, bound: Bound, modules: Callable[[], Any]) -> Any:
        graph = self.graph
        if graph is None or not graph.fits(bound) or not self._watch.is_undisturbed():
            return NotImplemented
        ones = tuple(size == 1 for value in bound.values() if type(value) is Tensor for size in value.shape)
        if ones in self._checked:
            return graph(bound)
        with self._lock:
            return self._check(graph, bound, ones, modules())

    def _check(self, graph: Graph, bound: Bound, ones: tuple[bool, ...], expected: Any) -> Any:
        try:
            found = graph(bound)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:  # what operators raise of a wrong shape
            self._drop(f"the graph cannot take such inputs ({type(error).__name__}: {error})")
            return expected
        if agree(found, expected):
            self._checked.add(ones)
            return found  # as at every later call
        self._drop("the graph does not give what the modules give")
        return expected

    def _drop(self, reason: str) -> None:
        self.graph, self.reason = None, reason
        log.warning("the modules run from now on: %s", reason)


class ModelSnapshot:
    """What stands for modules takes for granted about them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._children = [(m._modules, name, child) for m in self._modules for name, child in m._modules.items()]
        held = [(d, name, t) for m in self._modules for d in (m._parameters, m._buffers) for name, t in d.items()]
        self._tensors = [(d, name, t, _version(t)) for d, name, t in held if t is not None]
        counterparts = [one for one in self._modules if isinstance(one, Counterpart)]
        self._packed = [(one, one._pared_packed) for one in counterparts]

    def is_current(self) -> bool:
        """Whether all numbers are the same: packed weights, and tensors that were not written to."""
        return all(one._pared_packed is packed for one, packed in self._packed) and all(
            held.get(name) is tensor and _version(tensor) == version for held, name, tensor, version in self._tensors
        )

    def is_undisturbed(self) -> bool:
        """Whether all modules are where they were, in eval mode, and nobody listens to one of them but the first."""
        if torch_module._has_any_global_hook():
            return False
        if any(children.get(name) is not child for children, name, child in self._children):
            return False
        return not any(one.training for one in self._modules) and not has_listeners(self._model, self._modules)


def has_listeners(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> bool:
    """Whether a module inside has hooks; the model's own run outside of its forward."""
    inside = model.modules() if modules is None else modules
    return any((one._forward_hooks or one._forward_pre_hooks) and one is not model for one in inside)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 where that is not counted."""
    return 0 if tensor.is_inference() else tensor._version


def wants_gradients(model: nn.Module, given: object) -> bool:
    """Whether a call has to be differentiated: what packs weights cannot be."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(one, Tensor) and one.requires_grad for one in (*tree_leaves(given), *model.parameters()))


def agree(found: object, expected: object, tolerance: float = _TOLERANCE) -> bool:
    """Whether two outputs are the same but for rounding: floats by their energy, all else exactly.

    >>> agree([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.0001])]), agree(torch.ones(2), torch.ones(3))
    (True, False)
    """
    ours, structure = tree_flatten(found)
    theirs, their_structure = tree_flatten(expected)
    return structure == their_structure and all(_agree(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))


def _agree(found: object, expected: object, tolerance: float) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return type(found) is type(expected) and found == expected
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return False
    ours, theirs = found[finite].double(), expected[finite].double()
    return bool((ours - theirs).square().sum() <= tolerance * theirs.square().sum())
