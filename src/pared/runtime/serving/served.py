"""Modules whose calls something faster answers: a quantized model, and parts of it that may be called by themselves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from pared.model.copies import refresh_recurrent
from pared.runtime.layers.subclasses import Mixin, class_below, subclass_of
from pared.runtime.serving.server import Server

_SERVER: Final = "_pared_server"  # the attribute that holds it


class Served(Mixin):
    """Mixed in before a module's own class: its own `forward` runs only where its server has no answer."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """An independent module; graphs and packed weights are made anew at first use."""
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(_state(self), memo))  # type: ignore[no-untyped-call]  # torch's
        refresh_recurrent(clone)
        return clone

    def __copy__(self) -> nn.Module:
        """A shallow copy that shares every tensor."""
        clone = type(self).__new__(type(self))
        clone.__dict__.update(self.__dict__)
        return clone

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled by itself, a part is of its own class, which can be imported, and has no server."""
        state = {name: value for name, value in _state(self).items() if name != _SERVER}
        return _blank, (class_below(type(self), Served),), state


def _blank(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def _state(module: nn.Module) -> dict[str, Any]:
    if hasattr(module, "__getstate__"):  # every object has it from Python 3.11 on
        return dict(module.__getstate__())
    return dict(module.__dict__)


def serve(module: nn.Module, server: Server) -> None:
    """Let a server answer a module's calls, in place."""
    if _SERVER not in module.__dict__:
        base = type(module)
        module.__class__ = subclass_of(base, Served, members=lambda: {"forward": _forward(base.forward)})
    module.__dict__[_SERVER] = server


def release(module: nn.Module) -> None:
    """The inverse of `serve`, in place; also undoes whatever was mixed in before `Served`."""
    module.__dict__.pop(_SERVER, None)
    if isinstance(module, Served):
        module.__class__ = class_below(type(module), Served)  # type: ignore[assignment]  # what it was


def server_of(module: nn.Module) -> Server:
    """What answers the calls of a served module."""
    server: Server = module.__dict__[_SERVER]
    return server


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module's own class, whoever answers its calls."""
    forward: Callable[..., Any] = class_below(type(module), Served).forward
    return forward


def _forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a module's own class, where nothing faster answers; with its signature."""

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        server = self.__dict__.get(_SERVER)  # a slice of a Sequential is made of its class, without one
        found = NotImplemented if server is None else server.serve(self, args, kwargs, own)
        return own(self, *args, **kwargs) if found is NotImplemented else found

    return forward
