"""Parts of a model that are called by themselves, too: the encoder of a model that then decodes, the towers of two.

Such a part is known by what it is given: inputs of the model and nothing else, so whoever has these can call it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.profile import Timing
from pared.stats import Call, without_fast_paths
from pared.ways import bind, parameters_of

# What a part takes of the layers' time, at least: else it is not worth a graph of its own; and at most: else it is the
# model itself in a wrapper.
_LEAST: Final = 0.2
_MOST: Final = 0.9


def find_parts(model: nn.Module, call: Call, layers: Mapping[str, Timing]) -> dict[str, Call]:
    """The parts of a model, the outermost ones, each with the call that the model makes of it.

    Args:
        model: a float model in eval mode, which is left as it is.
        call: of the model; it is made again, if anything could be found.
        layers: the times of the layers, by name.
    """
    total = sum(timing.float32_ms for timing in layers.values())
    large = {
        name: module
        for name, module in model.named_modules()
        if name and name not in layers and _LEAST * total <= _time_in(name, layers) <= _MOST * total
    }
    seen = _calls_of(model, call, large) if total else {}
    return {name: found for name, found in seen.items() if not any(name.startswith(f"{other}.") for other in seen)}


def _time_in(name: str, layers: Mapping[str, Timing]) -> float:
    return sum(timing.float32_ms for layer, timing in layers.items() if layer.startswith(f"{name}."))


def _calls_of(model: nn.Module, call: Call, modules: Mapping[str, nn.Module]) -> dict[str, Call]:
    """Of the modules that are called once and with nothing but inputs of the model, the calls.

    What is given all of several inputs is the model in a wrapper.
    """
    inputs = {id(one) for one in _tensors(call.args, call.kwargs)}
    found: dict[str, list[Call | None]] = {name: [] for name in modules}

    def is_of_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = {id(one) for one in _tensors(args, kwargs)}
        if not given or not given <= inputs or (given == inputs and len(inputs) > 1):
            return False
        return bind(parameters_of(module), args, kwargs) is not None

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[name].append(Call(args, kwargs) if is_of_inputs(module, args, kwargs) else None)

        return note

    handles = [one.register_forward_pre_hook(hook(name), with_kwargs=True) for name, one in modules.items()]
    try:
        if handles:
            with torch.inference_mode(), without_fast_paths():
                model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: calls[0] for name, calls in found.items() if len(calls) == 1 and calls[0] is not None}


def _tensors(*values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
