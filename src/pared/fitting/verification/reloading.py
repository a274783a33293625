"""Whether what `load` will make of the file gives what the model gives that `fit` returns."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from pared.errors import ModelError
from pared.model.calls import Call, smallest_like_first
from pared.model.copies import clone_structure
from pared.model.outputs import tensors_of
from pared.model.recorded import draws
from pared.model.tensors import ModelTensors
from pared.runtime.quantized import assemble
from pared.runtime.record import contents_of, record_of
from pared.runtime.serving.served import on_modules

log = logging.getLogger(__name__)

_ROUNDING: Final = 1e-6  # share of the output's energy: kernels may sum in another order


def check_reloading(found: nn.Module, tensors: ModelTensors[nn.Module], calls: Sequence[Call]) -> None:
    """Refuse a result whose file would give another model: something outside of the file decides what it computes.

    Args:
        found: the quantized model, which is not called: copies of it are.
        tensors: those of the float model. An empty copy of it becomes what `load` would make.
        calls: what calibration saw; the smallest like the first is made on both.

    Raises:
        ModelError: the outputs differ by more than rounding, although those of two calls of the same model do not.
    """
    if not calls:
        return
    record, call = record_of(found), smallest_like_first(calls)
    empty = clone_structure(tensors.model, lambda tensor: torch.empty_like(tensor, device="meta"))
    loaded = assemble(tensors.in_copy(empty), contents_of(found), record.profile, record.memory)
    try:
        # Graphs are compared with the modules wherever they are made.
        ours, theirs = (_call(on_modules(one), call) for one in (copy.deepcopy(found), loaded))
        if _distance(ours, theirs) <= _ROUNDING:
            return
        again = _call(on_modules(copy.deepcopy(found)), call)
    except Exception as error:  # noqa: BLE001  # the model's, which went through the same call in calibration
        log.warning("the result could not be compared with what its file gives: %s: %s", type(error).__name__, error)
        return
    if _distance(ours, again) > _ROUNDING:
        log.debug("the result is random, so it cannot be compared with what its file gives")
        return
    raise ModelError(
        "what would be loaded from its file gives other outputs than the compressed model, on a calibration "
        "call: something other than weights decides about the outputs, and no file holds it",
        where=type(tensors.model).__name__,
        remedy="Look for results that the model keeps from one call to the next, in attributes or outside of it.",
    )


def _call(model: nn.Module, call: Call) -> list[torch.Tensor]:
    with torch.no_grad(), draws.alike():
        output: Any = call.on(model)
        return [tensor.detach().double() for tensor in tensors_of(output)]


def _distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The share of the energy by which outputs differ; infinite where their shapes do."""
    if [one.shape for one in ours] != [one.shape for one in theirs]:
        return float("inf")
    lost = sum(float((a - b)[a.isfinite() & b.isfinite()].square().sum()) for a, b in zip(ours, theirs, strict=True))
    total = sum(float(a[a.isfinite()].square().sum()) for a in ours)
    return lost / total if total else float(lost > 0)
