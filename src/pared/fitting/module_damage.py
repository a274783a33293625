"""What running a module in int8 costs, measured by running it, for modules whose products cannot be watched.

Recurrent layers and attention compute in one function of PyTorch, which hides its inner inputs (states, contexts).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from pared.errors import reason_of
from pared.fitting.calibration.observe import Statistics
from pared.fitting.calibration.perturbation import difference, values_of
from pared.fitting.calibration.sensitivity import InputNoise
from pared.fitting.rounding.encoding import encode
from pared.fitting.rounding.plan import DEFAULT_BITS
from pared.fitting.search.activations import Candidate, find_candidates
from pared.formats.activation import Range
from pared.model.calls import Call
from pared.model.contents import Decision, Stored
from pared.model.copies import shadow
from pared.model.tensors import ModelTensors
from pared.runtime.kernels.machine import FULL_LEVELS
from pared.runtime.layers.counterpart import stand_in
from pared.runtime.layers.table import layer_of, weights_of
from pared.switches import WITHOUT_FAST_PATHS, ignoring

log = logging.getLogger(__name__)

_MOST_CALLS: Final = 4
_TINY: Final = 1e-300


def try_modules(tensors: ModelTensors[nn.Module], seen: Statistics) -> dict[str, InputNoise]:
    """Measure the damage of 8-bit inputs for every module with a forward of its own in the table of layers.

    Args:
        tensors: those of the model, which is left as it is.
        seen: what calibration saw; the first four of its calls are repeated, twice for each module.

    Returns:
        the damage by the name of the module's first weight; empty if the model returns no floats.
    """
    if not seen.energies:
        return {}
    model = tensors.model
    wanted = {
        f"{name}.{attribute}".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if name in seen.inputs and (layer := layer_of(module)) and layer.forward is not None and not layer.missing()
        for attribute in (*weights_of(module), *(f"{part}.weight" for part in layer.children))
    }
    stored = [
        Stored(tensor.names, tensor.kind, encode(tensor, decision), decision)
        for tensor in tensors
        if tensor.weight_like and wanted & set(tensor.names)
        for decision in (Decision(tensor.name, "grid", DEFAULT_BITS, ""),)
    ]
    candidates = [c for c in find_candidates(model, stored, seen.inputs) if c.layer.forward and not c.layer.missing()]
    calls = seen.calls[:_MOST_CALLS]
    found: dict[str, InputNoise] = {}
    with torch.no_grad(), ignoring(), WITHOUT_FAST_PATHS:
        for candidate in candidates:
            try:
                noise = _noise(model, candidate, calls, seen.logits)
            except Exception as error:  # noqa: BLE001  # whatever the module makes of it: it stays in float then
                log.info("%s stays in float: %s", candidate.name, reason_of(error))
                noise = InputNoise(math.inf, math.inf)
            found[next(iter(candidate.weights.values())).name] = noise
    return found


def _noise(model: nn.Module, candidate: Candidate, calls: Sequence[Call], logits: Container[str]) -> InputNoise:
    """What it costs that one module runs in int8, as a share of the outputs' energy, the mean over the outputs.

    A static input is rounded to its grid before the module's dynamic kernel takes it: so it is on every machine.
    """
    copied = shadow(model)
    held: Mapping[str, Mapping[str, Stored]] = {
        candidate.name: candidate.weights,
        **{f"{candidate.name}.{child}".removeprefix("."): {"weight": s} for child, s in candidate.children.items()},
    }
    for name, weights in held.items():
        for attribute, stored in weights.items():
            copied.get_submodule(name).get_parameter(attribute).copy_(stored.coded.decode())
    expected = [values_of(copied, call, logits) for call in calls]
    (dynamic,) = candidate.options("dynamic")
    for name, activation in candidate.activations(dynamic).items():
        coded = {attribute: stored.coded for attribute, stored in held[name].items()}
        stand_in(copied.get_submodule(name), coded, activation)
    lost = difference(copied, calls, expected)
    if "static" not in candidate.layer.modes:
        return InputNoise(0.0, lost)
    (static,) = candidate.options("static")
    module = copied.get_submodule(candidate.name)
    module.register_forward_pre_hook(partial(_rounded, static.span), with_kwargs=True)
    most = max(lost, difference(copied, calls, expected))
    return InputNoise(most / max(InputNoise(1.0, 0.0).cost(static), _TINY), lost)


def _rounded(
    span: Range, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments whose `input`, the first, is on the grid of a range: a tensor, or a packed sequence."""
    scale, zero_point = span.grid(FULL_LEVELS)

    def on_grid(x: Any) -> Any:
        if isinstance(x, PackedSequence):
            return x._replace(data=on_grid(x.data))
        return ((x / scale).round_().add_(zero_point).clamp_(0, FULL_LEVELS).sub_(zero_point)).mul_(scale)

    if args:
        return (on_grid(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": on_grid(kwargs["input"])}
