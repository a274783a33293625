"""Modules whose calls a server answers: a quantized model, and submodels that are called on their own."""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from torch import nn

from pared.model.copies import deep_copy, is_guarded, refresh_recurrent
from pared.runtime.graphs.capturing import kept
from pared.runtime.graphs.capturing.capture import Captures
from pared.runtime.kernels.activation import FAR
from pared.runtime.layers.subclasses import Mixin, class_below, subclass_of
from pared.runtime.serving.server import Capture, Server

log = logging.getLogger(__name__)

SERVER: Final = "_pared_server"  # the attribute that holds it
_TOLD: Final = "_pared_told_of_range"
_TELLING: Final = threading.Lock()


class Served(Mixin):
    """Mixed in before a module's own class: its own `forward` only runs if its server does not answer.

    Attributes:
        pared_is_whole: whether it is a whole model, which tells of inputs that leave the calibrated ranges.
    """

    pared_is_whole: ClassVar[bool] = False

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """An independent module; graphs and packed weights are made again at first use."""
        if not is_guarded(memo):
            return deep_copy(self, memo)
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(_state(self), memo))  # type: ignore[no-untyped-call]  # torch's
        refresh_recurrent(clone)
        return clone

    def __copy__(self) -> nn.Module:
        """A shallow copy that shares every tensor."""
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        return clone

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle a submodel under its own class, which can be imported, and without its server."""
        state = {name: value for name, value in _state(self).items() if name != SERVER}
        return _blank, (class_below(type(self), Served),), state


def _tell_of_range(module: nn.Module) -> None:
    """Warn, once for each model, of an input that reached far beyond the range that calibration saw."""
    seen, FAR.seen = FAR.seen, None
    with _TELLING:
        told, module.__dict__[_TOLD] = module.__dict__.get(_TOLD, False), True
    if seen is not None and not told:
        log.warning(
            "%s: the input of a layer is far beyond the range that calibration saw, and was clipped to it (root mean "
            'square %.3g, range up to %.3g): calibrate with calls like this one, or with approach="dynamic"',
            *(type(module).__name__, *seen),
        )


def _blank(cls: type[nn.Module]) -> nn.Module:
    return object.__new__(cls)


def _state(module: nn.Module) -> dict[str, Any]:
    if hasattr(module, "__getstate__"):  # every object has it from Python 3.11 on
        return dict(module.__getstate__())
    return dict(module.__dict__)


def serve(module: nn.Module, server: Server) -> None:
    """Let a server answer a module's calls, in place."""
    if SERVER not in module.__dict__:
        base = type(module)
        module.__class__ = subclass_of(base, Served, members=lambda: {"forward": _forward(base.forward)})
    module.__dict__[SERVER] = server


def warm_up(model: nn.Module, captures: Mapping[str, Capture] | None = None) -> None:
    """Make what answers the calls of a model and its submodels now, so that no call has to wait for it.

    Args:
        model: the quantized model.
        captures: takes the place of a capture, by the name of the submodel; that of the model is "". Default: nothing
            is captured yet.
    """
    for name, module in model.named_modules():
        server = module.__dict__.get(SERVER)
        if server is not None:
            # What two servers need is captured once.
            server.warm(module, Captures(make=kept.captured) if captures is None else captures.get(name))


def on_modules(model: nn.Module) -> nn.Module:
    """Let the modules answer all calls of a model and its submodels from now on, in place."""
    for module in model.modules():
        module.__dict__.pop(SERVER, None)
    return model


def release(module: nn.Module) -> None:
    """Undo `serve`, in place, and whatever was mixed in on top of `Served`."""
    module.__dict__.pop(SERVER, None)
    module.__dict__.pop(_TOLD, None)
    if isinstance(module, Served):
        module.__class__ = class_below(type(module), Served)  # type: ignore[assignment]  # what it was


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module's own class, without its server."""
    forward: Callable[..., Any] = class_below(type(module), Served).forward
    return forward


def _forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that asks the server before it runs the module's own, whose signature it has."""

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.pared_is_whole:
            FAR.seen = None  # whatever else ran in this thread
        server = self.__dict__.get(SERVER)  # a slice of a Sequential is made of its class, without one
        found = NotImplemented if server is None else server.serve(self, args, kwargs, own)
        found = own(self, *args, **kwargs) if found is NotImplemented else found
        if FAR.seen is not None and self.pared_is_whole:
            _tell_of_range(self)
        return found

    return forward
