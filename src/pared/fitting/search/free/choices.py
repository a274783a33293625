"""What can be chosen for a model: in pared's own file, or in the files of another runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import nn

from pared.fitting.calibration.sensitivity import Sensitivity, TensorStats
from pared.fitting.config import OWN, PostTrainingQuantConfig
from pared.fitting.rounding import encoding, plan
from pared.fitting.rounding.importance import unreached
from pared.fitting.search.free.free import Choices
from pared.fitting.search.free.offers import trace_unit
from pared.fitting.search.free.on_grids import trace_tensor
from pared.fitting.search.free.units import assigned, target_nbytes
from pared.model import storage
from pared.model.contents import Decision
from pared.model.tensors import ModelTensor, ModelTensors
from pared.targets.table import TARGETS

# Total importance (damage at a relative error of 1): no tensor's is below this share of the median tensor's, so that
# what calibration hardly touches is not wiped out ...
_MIN_SHARE_OF_MEDIAN: Final = 0.01
# ... and the median itself is capped: such errors are too large for damage to be quadratic in them.
_MAX_MEDIAN: Final = 10.0


def choices_for(
    tensors: ModelTensors[nn.Module], conf: PostTrainingQuantConfig, sensitivity: Sensitivity | None
) -> Choices:
    """What can be chosen for a model.

    Args:
        tensors: those of the float model.
        conf: what is wanted.
        sensitivity: what errors cost; None if it was not measured.

    Raises:
        ConfigError: a rule matches nothing, or asks for what there is not; or `conf.strict` and a tensor would stay in
            float without a rule.
    """
    measured = sensitivity.tensors if sensitivity else {}

    def reason(tensor: ModelTensor) -> str:
        return unreached(tensor, measured.get(tensor.name)) if sensitivity else ""

    return (_of_own_file if conf.target == OWN else _of_target)(tensors, conf, measured, reason)


def check_rules(tensors: ModelTensors[nn.Module], conf: PostTrainingQuantConfig) -> None:
    """Refuse rules that cannot be followed.

    Raises:
        ConfigError: as `choices_for`.
    """
    if conf.target == OWN:
        plan.make_plan(tensors, conf.rules, strict=conf.strict)
    else:
        assigned(tensors, conf, TARGETS[conf.target])


def _of_own_file(
    tensors: ModelTensors[nn.Module],
    conf: PostTrainingQuantConfig,
    measured: Mapping[str, TensorStats],
    reason: Callable[[ModelTensor], str],
) -> Choices:
    decisions = plan.make_plan(tensors, conf.rules, bits=None, strict=conf.strict)
    pairs = list(zip(tensors, decisions, strict=True))
    fixed = {tensor.name: encoding.encode(tensor, decision) for tensor, decision in pairs if not _is_free(decision)}
    free = [tensor for tensor, decision in pairs if _is_free(decision)]
    stats = _complete(free, measured)
    fine = conf.quant_level == 0
    traced = [
        trace_tensor(tensor, stats[tensor.name], strict=conf.strict, fine=fine, because=reason(tensor))
        for tensor in free
    ]
    return Choices(decisions, fixed, traced, lambda contents: len(storage.to_bytes(contents)))


def _of_target(
    tensors: ModelTensors[nn.Module],
    conf: PostTrainingQuantConfig,
    measured: Mapping[str, TensorStats],
    reason: Callable[[ModelTensor], str],
) -> Choices:
    target = TARGETS[conf.target]
    found = assigned(tensors, conf, target)
    in_units = [tensor for unit in found.units for tensor in unit.tensors]
    names = {tensor.name for tensor in in_units}
    fixed = {
        tensor.name: encoding.encode(tensor, decision)
        for tensor, decision in zip(tensors, found.plan, strict=True)
        if tensor.name not in names
    }
    stats = _complete(in_units, measured)
    traced = [trace_unit(unit, stats, reason) for unit in found.units]
    return Choices(found.plan, fixed, traced, partial(target_nbytes, target), exact=True)


def _is_free(decision: Decision) -> bool:
    """Whether the search decides the tensor's step."""
    return decision.treatment == "grid" and decision.bits is None


def _complete(model_tensors: Sequence[ModelTensor], known: Mapping[str, TensorStats]) -> dict[str, TensorStats]:
    """Statistics of every tensor, by name.

    A tensor on which no output was seen to depend counts like the median one at the same relative error.
    """
    energies = {
        model_tensor.name: float(model_tensor.tensor.detach().float().square().mean()) or 1.0
        for model_tensor in model_tensors
    }
    totals = {name: float(stats.rows.sum()) * energies[name] for name, stats in known.items() if name in energies}
    positive = [total for total in totals.values() if 0 < total < math.inf]
    median = min(float(np.median(positive)), _MAX_MEDIAN) if positive else 1.0 / max(1, len(model_tensors))
    completed = {}
    for model_tensor in model_tensors:
        stats, total = known.get(model_tensor.name), totals.get(model_tensor.name, 0.0)
        if stats is None or not 0 < total < math.inf:
            rows = model_tensor.view.n_rows
            stats = TensorStats(torch.full((rows,), median / energies[model_tensor.name] / rows, dtype=torch.float64))
        elif total < _MIN_SHARE_OF_MEDIAN * median:
            stats = replace(stats, rows=stats.rows * (_MIN_SHARE_OF_MEDIAN * median / total))
        completed[model_tensor.name] = stats
    return completed
