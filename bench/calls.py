"""Which kinds of calls a use of a model makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pared.runtime.graphs.call_kinds import Argument, arguments_of, bind, kind_of, parameters_of


@contextmanager
def kinds_noted(model: nn.Module) -> Iterator[dict[object, tuple[Argument, ...]]]:
    """The kinds of the calls that are made until the context ends, each with the last call of it."""
    seen: dict[object, tuple[Argument, ...]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = bind(parameters_of(module), args, kwargs)
        if bound is not None:
            seen[kind_of(bound)] = arguments_of(bound)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
