"""Gives more than 8 bits to each tensor that would do too much damage with 8."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from torch import nn

from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding.encoding import sample_cost
from pared.fitting.rounding.importance import unreached
from pared.fitting.rounding.plan import DEFAULT_BITS, refuse_float
from pared.formats.coded import survives_float16
from pared.formats.grids import CODE_LIMITS
from pared.model.contents import Decision, Plan, Treatment
from pared.model.tensors import ModelTensor, ModelTensors

# Damage that a tensor may do alone at 8 bits: 30 dB below the output's energy.
_DAMAGE_ALONE: Final = 1e-3
# More bits for many weights cost time and bytes that tell (finer codes run in float). All tensors of at least this many
# weights together may do more damage, 20 dB below the output's energy, shared out by their numbers of weights.
_MANY_WEIGHTS: Final = 1 << 22
_DAMAGE_TOGETHER: Final = 1e-2
# How many times int16's step may halve int8's (127 * 2^8 still fits), and the most bits that such codes may take.
_MAX_HALVINGS: Final = 8
_MAX_BITS: Final = 15.0
_CLEAR: Final = 0.1  # of the damage that a tensor may do alone: below, a rough estimate says that 8 bits are enough
_SAMPLED_ROWS: Final = 64  # are rounded to estimate the bytes of 8-bit codes


def with_enough_bits(
    plan: Plan, model_tensors: ModelTensors[nn.Module], known: Mapping[str, TensorStats], *, strict: bool = False
) -> Plan:
    """The plan with its damages, and more than 8 bits for each tensor that would do too much damage with 8.

    That happens if the channels of an input differ widely in scale: then the columns of a row do so too, and the row's
    step is too coarse for those that count. Tensors that a rule names are left as they are.

    Args:
        plan: at the default rate.
        model_tensors: the model's tensors.
        known: what errors cost, by the tensor's name.
        strict: raise an error for a tensor of two or more dimensions for which no grid is fine enough.

    Raises:
        ConfigError: `strict`, and there is such a tensor.
    """
    pairs = list(zip(plan, model_tensors, strict=True))
    weights = sum(model_tensor.tensor.numel() for decision, model_tensor in pairs if decision.treatment == "grid")
    refined = tuple(
        _explained(
            _with_enough_bits(decision, model_tensor, known.get(model_tensor.name), weights), model_tensor, known
        )
        for decision, model_tensor in pairs
    )
    if strict:
        refuse_float(
            [(model_tensor, new) for (old, model_tensor), new in zip(pairs, refined, strict=True) if new != old]
        )
    return refined


def is_clear(model_tensors: ModelTensors[nn.Module], known: Mapping[str, TensorStats]) -> bool:
    """Whether no tensor comes near to needing more than 8 bits, so that a rough estimate of what errors cost will do.

    Args:
        model_tensors: the model's tensors.
        known: a rough estimate, by the tensor's name. It is not enough for a weight that it has not reached.
    """
    pairs = [(tensor, known.get(tensor.name)) for tensor in model_tensors if tensor.fits_grid]
    if any(unreached(tensor, stats) for tensor, stats in pairs):
        return False
    return all(stats is None or _at_eight_bits(tensor, stats) < _CLEAR * _DAMAGE_ALONE for tensor, stats in pairs)


def _at_eight_bits(model_tensor: ModelTensor, stats: TensorStats) -> float:
    """The damage of a tensor at 8 bits."""
    matrix = model_tensor.view.matrix(model_tensor.tensor.detach().float())
    steps = matrix.abs().amax(1).double() / CODE_LIMITS["int8"]
    return float((stats.rows * steps.square()).sum()) / 12  # the variance of an error within a step


def _explained(decision: Decision, model_tensor: ModelTensor, known: Mapping[str, TensorStats]) -> Decision:
    """The decision with what is to be said of a weight that calibration did not reach."""
    if decision.treatment != "grid" or decision.because:
        return decision
    return replace(decision, because=unreached(model_tensor, known.get(model_tensor.name)))


def _with_enough_bits(
    decision: Decision, model_tensor: ModelTensor, stats: TensorStats | None, weights: int
) -> Decision:
    if decision.treatment != "grid" or decision.bits != DEFAULT_BITS or decision.because or stats is None:
        return decision
    damage = _at_eight_bits(model_tensor, stats)
    share = model_tensor.tensor.numel() / weights if model_tensor.tensor.numel() >= _MANY_WEIGHTS else 0.0
    allowed = max(_DAMAGE_ALONE, _DAMAGE_TOGETHER * share)
    if not allowed < damage < math.inf:
        return replace(decision, damage=damage if damage < math.inf else None)
    because = f"at 8 bits it would do a damage of {damage:.2g}"
    halvings = math.ceil(math.log(damage / allowed, 4))
    # Each halving of the step adds a bit to what 8-bit codes take when they are entropy coded.
    coded = 8 * sample_cost(model_tensor, decision, _SAMPLED_ROWS).nbytes / model_tensor.tensor.numel()
    bits = max(coded + halvings, DEFAULT_BITS + 0.01)  # up to 8 bits no step is finer than int8's
    if halvings <= _MAX_HALVINGS and bits <= _MAX_BITS:
        return replace(decision, bits=round(bits, 2), because=because, damage=damage / 4**halvings)
    # No grid is fine enough; floating-point numbers each have a precision of their own.
    treatment: Treatment = "float16" if survives_float16(model_tensor.tensor) else "exact"
    return replace(decision, treatment=treatment, bits=None, because=because)
