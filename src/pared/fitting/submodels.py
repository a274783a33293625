"""Submodels that are also called on their own: the encoder of an encoder-decoder model, the towers of a two-tower one.

Such a submodel is recognized by its inputs: they are inputs of the model and nothing else, so callers of the model can
call it as well.
"""

from __future__ import annotations

import time
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.model.calls import Call
from pared.runtime.graphs.call_kinds import bind, parameters_of
from pared.runtime.layers.registry import layer_of
from pared.switches import WITHOUT_FAST_PATHS

# The least and the greatest share of the model's time that a submodel takes: below, it is not worth a graph of its own;
# above, it is the model itself in a wrapper.
_LEAST: Final = 0.2
_MOST: Final = 0.9


def find_submodels(model: nn.Module, call: Call) -> dict[str, Call]:
    """The outermost of such submodels by name, each with the call that the model makes of it.

    Args:
        model: a float model in eval mode, which is left as it is.
        call: a call of the model; it is repeated.
    """
    watches = {
        name: _Watch(call)
        for name, module in model.named_modules()
        if name and any(True for _ in module.children()) and layer_of(module) is None
    }
    if not watches:
        return {}
    handles = [handle for name, watch in watches.items() for handle in watch.over(model.get_submodule(name))]
    try:
        with torch.inference_mode(), WITHOUT_FAST_PATHS:
            start = time.perf_counter()
            model(*call.args, **call.kwargs)
            total = time.perf_counter() - start
    finally:
        for handle in handles:
            handle.remove()
    found = {
        name: watch.calls[0]
        for name, watch in watches.items()
        if len(watch.calls) == 1 and watch.calls[0] is not None and _LEAST * total <= watch.seconds <= _MOST * total
    }
    return {name: one for name, one in found.items() if not any(name.startswith(f"{other}.") for other in found)}


class _Watch:
    """The calls that a model makes of one module, None where it is given more than inputs, and the seconds they take.

    Args:
        call: the call of the model.
    """

    def __init__(self, call: Call) -> None:
        self._inputs = {id(one) for one in _tensors(call.args, call.kwargs)}
        self.calls: list[Call | None] = []
        self.seconds = 0.0

    def over(self, module: nn.Module) -> tuple[Any, Any]:
        """Add hooks to a module, and return their handles."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls.append(Call(args, kwargs) if self._is_of_inputs(module, args, kwargs) else None)
            self.seconds -= time.perf_counter()

        def after(*_: object) -> None:
            self.seconds += time.perf_counter()

        return module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)

    def _is_of_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = {id(one) for one in _tensors(args, kwargs)}
        # A module that is given all of several inputs is the model in a wrapper.
        if not given or not given <= self._inputs or (given == self._inputs and len(given) > 1):
            return False
        return bind(parameters_of(module), args, kwargs) is not None


def _tensors(*values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
