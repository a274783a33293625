"""What can be chosen for a model: in pared's own file, or in the files of another runtime."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import nn

from pared.fitting.calibration.sensitivity import Sensitivity, TensorStats
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.rounding import encoding, plan
from pared.fitting.rounding.importance import unreached
from pared.fitting.search.free.free import Choices
from pared.fitting.search.free.offers import trace_unit
from pared.fitting.search.free.on_grids import trace_tensor
from pared.fitting.search.free.units import assigned, target_nbytes
from pared.model import storage
from pared.model.contents import Decision
from pared.model.tensors import ModelTensor, ModelTensors
from pared.targets.table import OWN, TARGETS
from pared.targets.target import is_stack

log = logging.getLogger(__name__)

# Total importance (damage at a relative error of 1): no tensor's is below this share of the median tensor's, so that
# what calibration hardly touches is not wiped out ...
_MIN_SHARE_OF_MEDIAN: Final = 0.01
# ... and the median itself is capped: such errors are too large for damage to be quadratic in them.
_MAX_MEDIAN: Final = 10.0
_AT_ONCE: Final = 1 << 24  # numbers whose squares are in memory at once


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
        return
    target = TARGETS[conf.target]
    found = assigned(tensors, conf, target)
    left = [
        tensor
        for tensor, decision in zip(tensors, found.plan, strict=True)
        if is_stack(tensor.tensor.shape) and decision.treatment == "exact" and target.takes == "weights"
    ]
    if left:
        log.warning(
            "%s has no format for stacks of matrices: %s and %d more stay as they are, %s of %s bytes. Experts whose "
            "matrices are linear layers are rounded; so does pared compress --target where a checkpoint names each",
            *(target.name, left[0].name, len(left) - 1),
            *(f"{sum(one.tensor.nbytes for one in some):,}" for some in (left, list(tensors))),
        )


def _of_own_file(
    tensors: ModelTensors[nn.Module],
    conf: PostTrainingQuantConfig,
    measured: Mapping[str, TensorStats],
    reason: Callable[[ModelTensor], str],
) -> Choices:
    decisions = plan.make_plan(tensors, conf.rules, bits=None, strict=conf.strict)
    pairs = list(zip(tensors, decisions, strict=True))
    fixed = {tensor.name: encoding.encode(tensor, decision) for tensor, decision in pairs if not is_free(decision)}
    free = [tensor for tensor, decision in pairs if is_free(decision)]
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
    # Where the numbers are not bfloat16, the runtime may compute in float16, whatever the folder's configuration says.
    kinds = {one.tensor.dtype for one in tensors if one.tensor.is_floating_point()}
    target = TARGETS[conf.target].for_model("bfloat16" if kinds == {torch.bfloat16} else "float16")
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


def is_free(decision: Decision) -> bool:
    """Whether the search decides the tensor's step."""
    return decision.treatment == "grid" and decision.bits is None


def _complete(model_tensors: Sequence[ModelTensor], known: Mapping[str, TensorStats]) -> dict[str, TensorStats]:
    """Statistics of every tensor, by name, see `completing`."""
    costs = {one.name: cost_of(one, known.get(one.name)) for one in model_tensors}
    factors = completing(costs)
    completed = {}
    for model_tensor in model_tensors:
        stats = stats_or_even(model_tensor, known.get(model_tensor.name))
        factor = factors[model_tensor.name]
        completed[model_tensor.name] = stats if factor == 1 else replace(stats, rows=stats.rows * factor)
    return completed


def cost_of(model_tensor: ModelTensor, stats: TensorStats | None) -> float | None:
    """The damage at a relative error of 1; None where no output was seen to depend on the tensor."""
    total = 0.0 if stats is None else float(stats.rows.sum()) * _energy(model_tensor)
    return total if 0 < total < math.inf else None


def stats_or_even(model_tensor: ModelTensor, stats: TensorStats | None) -> TensorStats:
    """What was measured; where nothing was, as if a relative error of 1 did a damage of 1, equally in all rows."""
    if stats is not None and cost_of(model_tensor, stats) is not None:
        return stats
    rows = model_tensor.view.n_rows
    return TensorStats(torch.full((rows,), 1.0 / _energy(model_tensor) / rows, dtype=torch.float64))


def completing(costs: Mapping[str, float | None]) -> dict[str, float]:
    """How many times as much each tensor is to count as `stats_or_even` says, by name.

    One on which no output was seen to depend counts like the median one at the same relative error, and none counts
    far less.

    Args:
        costs: those of all tensors, see `cost_of`.

    >>> completing({"a": 4.0, "b": 2.0, "c": 0.001, "d": None})
    {'a': 1.0, 'b': 1.0, 'c': 20.0, 'd': 2.0}
    """
    positive = [cost for cost in costs.values() if cost is not None]
    median = min(float(np.median(positive)), _MAX_MEDIAN) if positive else 1.0 / max(1, len(costs))
    least = _MIN_SHARE_OF_MEDIAN * median
    return {name: median if cost is None else 1.0 if cost >= least else least / cost for name, cost in costs.items()}


def _energy(model_tensor: ModelTensor) -> float:
    """The mean square of its numbers; 1 of zeros."""
    matrix = model_tensor.tensor.detach().reshape(-1)
    total = (
        sum(float(some.float().square().mean()) * len(some) for some in matrix.split(_AT_ONCE)) if len(matrix) else 0.0
    )
    return total / max(1, len(matrix)) or 1.0
