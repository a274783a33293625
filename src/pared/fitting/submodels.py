"""Submodels that users may also call directly: the encoder of an encoder-decoder, the towers of a two-tower model.

They are recognized by their arguments: inputs of the model and nothing else, so that callers can pass them, too.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.errors import reason_of
from pared.model.calls import Call
from pared.model.recorded.values import is_transformed
from pared.runtime.graphs.call_kinds import bind, parameters_of
from pared.runtime.layers.table import layer_of
from pared.runtime.stopwatch import Stopwatch
from pared.switches import WITHOUT_FAST_PATHS

log = logging.getLogger(__name__)

# The share of the model's time that a submodel takes: below, it is not worth a graph of its own. Above this share of
# the time or of the weights, the model is only a wrapper of it.
_LEAST_SHARE: Final = 0.2
_MOST_SHARE: Final = 0.9


def find_submodels(model: nn.Module, call: Call) -> dict[str, Call]:
    """The outermost submodels, by name, each with the call that the model makes of it.

    There are none if the call changes its arguments or the model: then theirs are not known either.

    Args:
        model: a float model in eval mode, which is left as it is.
        call: a call of the model, which is repeated.
    """
    if call.side_effects:
        return {}
    recorders = {
        name: _CallRecorder(call)
        for name, module in model.named_modules()
        if name and any(True for _ in module.children()) and layer_of(module) is None
    }
    if not recorders:
        return {}
    total = Stopwatch()
    handles = [handle for name, recorder in recorders.items() for handle in recorder.over(model.get_submodule(name))]
    try:
        with torch.no_grad(), WITHOUT_FAST_PATHS:
            total.start()
            call.on(model)
            total.stop()
    except Exception as error:  # noqa: BLE001  # whatever the model makes of hooks on its modules
        log.info("no submodels are timed on their own: %s", reason_of(error))
        return {}
    finally:
        for handle in handles:
            handle.remove()
    weights = _numbers(model)
    found = {
        name: recorder.calls[0]
        for name, recorder in recorders.items()
        if len(recorder.calls) == 1 and recorder.calls[0] is not None
        if _LEAST_SHARE <= recorder.time.seconds / total.seconds <= _MOST_SHARE
        and _numbers(model.get_submodule(name)) <= _MOST_SHARE * weights
    }
    return {name: call for name, call in found.items() if not any(name.startswith(f"{outer}.") for outer in found)}


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class _CallRecorder:
    """Hooks that record the calls of one module within a call of the model, and how long they take.

    Attributes:
        calls: None for a call whose arguments are not only inputs of the model.
        time: the time of all calls.
    """

    def __init__(self, call: Call) -> None:
        self._inputs = {id(tensor) for tensor in _tensors(call.args, call.kwargs)}
        self.calls: list[Call | None] = []
        self.time = Stopwatch()

    def over(self, module: nn.Module) -> tuple[Any, Any]:
        """Hook a module; returns the handles of the hooks."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls.append(Call(args, kwargs) if self._has_only_inputs(module, args, kwargs) else None)
            self.time.start()

        def after(*_: object) -> None:
            self.time.stop()

        return module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)

    def _has_only_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if is_transformed():
            return False
        given = {id(tensor) for tensor in _tensors(args, kwargs)}
        # A module that gets all of several inputs is the model inside a wrapper.
        if not given or not given <= self._inputs or (given == self._inputs and len(given) > 1):
            return False
        return bind(parameters_of(module), args, kwargs) is not None


def _tensors(*values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
