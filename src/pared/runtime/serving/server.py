"""Which calls of a quantized model are answered by something other than its modules: a graph, or a copy in bfloat16."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pared.model.recorded.entries import Entries
from pared.runtime.graphs.call_kinds import Argument, Bound, bind, kind_of, parameters_of, tensors_of
from pared.runtime.graphs.capturing.capture import Captured
from pared.runtime.layers.counterpart import Counterpart, is_ordinary_call

Skeleton = Callable[[nn.Module], nn.Module]
Capture = Callable[[nn.Module, Sequence[Argument]], Captured]  # turns a call of a float model into a graph
Args = tuple[Any, ...]
Sizes = tuple[float, float]

_VERSION: Final = attrgetter("_version")
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks")


class Server(ABC):
    """Answers calls of a model in place of its modules."""

    @abstractmethod
    def serve(self, model: nn.Module, args: Args, kwargs: dict[str, Any], modules: Callable[..., Any]) -> Any:
        """The model's output for a call; NotImplemented if `modules`, the model's own forward, has to answer."""

    @abstractmethod
    def warm(self, model: nn.Module, captured: Capture | None = None) -> None:
        """Make what answers the calls, which the first of them would have to wait for otherwise.

        Args:
            model: the model that it serves.
            captured: captures in place of the server's own, this once. Default: its own.
        """


class KindServer(Server):
    """Answers the calls of certain kinds.

    Args:
        skeleton: makes a float model of the same architecture and class from the quantized model.
        wanted: an example call for every call kind that is to be served; default: none is.
        sizes: for each of these the least numbers in the tensors of a call that is served, and the numbers from which
            on none is. Default: any.
    """

    def __init__(
        self, skeleton: Skeleton, wanted: Sequence[Sequence[Argument]] = (), sizes: Sequence[Sizes] = ()
    ) -> None:
        self._skeleton = skeleton
        self.wanted = tuple(tuple(arguments) for arguments in wanted)
        self.sizes = tuple(sizes)
        self._kinds: dict[tuple[object, ...], tuple[Argument, ...]] = {
            tuple(argument.kind for argument in arguments): arguments for arguments in self.wanted
        }
        self._tensors: Final = {tensors_of(kind) for kind in self._kinds}
        self._limits: dict[tuple[object, ...], list[Sizes]] = {}
        for arguments, limits in zip(self.wanted, self.sizes, strict=False):
            self._limits.setdefault(tuple(argument.kind for argument in arguments), []).append(limits)
        self._names: tuple[str, ...] | None = None
        self._all_parameters: _Parameters | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> KindServer:
        """A server for the copied model, without what refers to the tensors of this one."""
        return type(self)(self._skeleton, self.wanted, sizes=self.sizes)

    def serve(self, model: nn.Module, args: Args, kwargs: dict[str, Any], modules: Callable[..., Any]) -> Any:
        """The model's output for a call; NotImplemented if `modules`, the model's own forward, has to answer."""
        bound = self._bound(model, args, kwargs)
        if bound is None:
            return NotImplemented
        return self._answer(model, bound, lambda: modules(model, *args, **kwargs))

    def _bound(self, model: nn.Module, args: Args, kwargs: dict[str, Any]) -> Bound | None:
        """The call's arguments by name; None if the call is not to be answered."""
        if not self._kinds or not is_ordinary_call() or torch.is_autocast_enabled("cpu"):
            return None
        if self._names is None:
            self._names = parameters_of(model)
        bound = bind(self._names, args, kwargs)
        if bound is None or self._wants_gradients(model, bound):
            return None
        kind = kind_of(bound)
        limits = self._limits.get(kind, [(0.0, math.inf)])
        size = sum(value.numel() for value in bound.values() if type(value) is Tensor)
        fits = any(least <= size < below for least, below in limits)
        return bound if fits and tensors_of(kind) in self._tensors else None

    def _wants_gradients(self, model: nn.Module, bound: Bound) -> bool:
        """Whether a call needs gradients, which neither graphs nor packed weights have."""
        if not torch.is_grad_enabled():
            return False
        if any(type(one) is Tensor and one.requires_grad for one in bound.values()):
            return True
        if self._all_parameters is None or not self._all_parameters.are_current():
            self._all_parameters = _Parameters(model)
        return self._all_parameters.want_gradients()

    @abstractmethod
    def _answer(self, model: nn.Module, bound: Bound, modules: Callable[[], Any]) -> Any:
        """The output for a call of a wanted kind, or NotImplemented; `modules` runs the call on the modules."""


class FirstOf(Server):
    """Lets several servers answer, in this order: the first that serves a call does.

    Args:
        servers: each for other kinds of calls.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = tuple(servers)

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstOf:
        """The same for the copied model."""
        return FirstOf([copy.deepcopy(server, memo) for server in self._servers])

    def serve(self, model: nn.Module, args: Args, kwargs: dict[str, Any], modules: Callable[..., Any]) -> Any:
        """The model's output; NotImplemented if none of the servers gives it."""
        for server in self._servers:
            if (found := server.serve(model, args, kwargs, modules)) is not NotImplemented:
                return found
        return NotImplemented

    def warm(self, model: nn.Module, captured: Capture | None = None) -> None:
        """Make what answers the calls of all servers."""
        for server in self._servers:
            server.warm(model, captured)


class ModelSnapshot:
    """A model as it was when something was made to stand in for its modules, and what has changed since."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        registries = [registry for one in modules for registry in (one._parameters, one._buffers)]
        held = [(registry, name, one) for registry in registries for name, one in registry.items() if one is not None]
        counterparts = [vars(one) for one in modules if isinstance(one, Counterpart)]
        self._held = Entries([*held, *((one, "_pared_packed", one["_pared_packed"]) for one in counterparts)])
        self._counted = [one for _, _, one in held if not one.is_inference()]  # of others, torch counts no writes
        self._versions = list(map(_VERSION, self._counted))
        inside = [(vars(one), name, vars(one)[name]) for one in modules[1:] for name in _HOOKS]
        self._hooks = [hooks for _, _, hooks in inside]
        modes = ((vars(one), "training", False) for one in modules)
        self._in_place = Entries([*_children_of(modules), *modes, *inside])

    def is_current(self) -> bool:
        """Whether no weight was packed again and no tensor replaced or written to."""
        return self._held.are_as_they_were() and list(map(_VERSION, self._counted)) == self._versions

    def is_undisturbed(self) -> bool:
        """Whether all modules are in place and in eval mode, and none of them has hooks except the first."""
        return self._in_place.are_as_they_were() and not any(self._hooks) and not torch_module._has_any_global_hook()


def has_listeners(model: nn.Module) -> bool:
    """Whether a module inside a model has hooks, or all modules have; the model's own run outside its forward."""
    inside = (one for one in model.modules() if one is not model)
    return torch_module._has_any_global_hook() or any(one._forward_hooks or one._forward_pre_hooks for one in inside)


def _children_of(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, object]]:
    return ((one._modules, name, child) for one in modules for name, child in one._modules.items())


class _Parameters:
    """The parameters of a model, looked for once while its modules stay in place."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._children = Entries(_children_of(modules))
        self._counts = [(m._modules, len(m._modules)) for m in modules]
        self._registries = [m._parameters for m in modules]

    def are_current(self) -> bool:
        """Whether no module was replaced or added."""
        return self._children.are_as_they_were() and all(len(held) == count for held, count in self._counts)

    def want_gradients(self) -> bool:
        """Whether one of them does."""
        every = (one for registry in self._registries for one in registry.values())
        return any(one is not None and one.requires_grad for one in every)
