"""The options of a tensor whose step is free: grids from fine to coarse, and floats, with bytes and damage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pared.allocate import Options
from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding import encoding, plan
from pared.fitting.rounding.curves import RateCurve, trace
from pared.fitting.rounding.importance import make_target, plain_target
from pared.fitting.rounding.scales.choice import chosen_scales, nbytes_of, scaled_stats
from pared.fitting.rounding.targets import RoundingTarget, ceilings, solve, without_empty_slices
from pared.formats.coded import Coded, Grid, survives_float16
from pared.formats.grids import CODE_LIMITS, CodeType
from pared.formats.views import View
from pared.model.contents import Decision, Treatment
from pared.model.tensors import ModelTensor

# Bytes by which an index entry for codes and steps is longer than one for plain values (an estimate).
GRID_ENTRY: Final = 24
# An int16 option is kept if int8 at the same step does at least this many times its damage.
_MIN_GAIN_OF_INT16: Final = 1.25
# If the finest grid does more damage than this, the tensor may also stay as it is: a thousandth of the damage at which
# a search begins.
_MAX_DAMAGE_OF_FINEST: Final = 1e-6
_WHY_FLOAT: Final[Mapping[Treatment, str]] = {
    "float16": "as float16 it does less damage in as few bytes than on a grid",
    "exact": "no grid is fine enough for it",
}


_NO_GRID: Final = RateCurve(np.zeros(0, np.int64), (), np.zeros(0), np.zeros(0))


@dataclass(frozen=True, eq=False)
class FreeTensor:
    """A tensor whose step the allocation decides.

    Args:
        model_tensor: the tensor.
        target: what is needed to round it.
        curve: its grids, from fine to coarse.
        options: bytes and damage of the curve's grids, then of the `plain` ones.
        plain: decisions that need no search: a grid at 8 bits, or floats.
        because: what is to be said of it on a grid.
        may_stay: whether it may stay as it is.
    """

    model_tensor: ModelTensor
    target: RoundingTarget
    curve: RateCurve
    options: Options
    plain: tuple[Decision, ...] = ()
    because: str = ""
    may_stay: bool = True

    @property
    def tensors(self) -> tuple[ModelTensor, ...]:
        """See `Free`; so are the other methods."""
        return (self.model_tensor,)

    @property
    def held(self) -> tuple[tuple[Coded, ...], float]:
        """Zeros on a grid."""
        shape = tuple(self.model_tensor.tensor.shape)
        parts = {"codes": torch.zeros(shape, dtype=torch.int8), "step": torch.ones(self.target.view.row_sizes)}
        zeros = Coded(Grid("int8"), shape, self.model_tensor.tensor.dtype, parts, self.target.view)
        return (zeros,), zeros.nbytes + GRID_ENTRY

    def decisions(self, option: int) -> tuple[Decision, ...]:
        """What an option means."""
        return (self.decision(option),)

    def coded(self, option: int) -> tuple[Coded, ...]:
        """The tensor, rounded."""
        return (rounded(self, option),)

    def corrected(self, factors: Mapping[str, float]) -> FreeTensor:
        """With other damage."""
        factor = factors.get(self.model_tensor.name)
        return self if factor is None else _corrected(self, factor)

    def decision(self, option: int) -> Decision:
        """What an option means, with its damage."""
        damage = float(self.options.damage[option])
        if option >= len(self.curve.codes):
            return replace(self.plain[option - len(self.curve.codes)], damage=damage)
        bits = 8 * float(self.options.nbytes[option]) / self.model_tensor.tensor.numel()
        return Decision(self.model_tensor.name, "grid", round(bits, 3), self.because, damage)


def _corrected(free: FreeTensor, factor: float) -> FreeTensor:
    """The same tensor where every option does this many times the damage; it may stay as it is, if that is allowed."""
    free = scaled(free, factor)
    if not free.may_stay or any(decision.treatment == "exact" for decision in free.plain):
        return free
    model_tensor, options = free.model_tensor, free.options
    nbytes = np.append(options.nbytes, float(model_tensor.tensor.numel() * model_tensor.tensor.element_size()))
    plain = (*free.plain, _in_float(model_tensor, "exact"))
    return replace(free, options=Options(nbytes, np.append(options.damage, 0.0)), plain=plain)


def scaled(free: FreeTensor, factor: float) -> FreeTensor:
    """The same tensor with the same options, each of which does this many times the damage."""
    return replace(free, options=Options(free.options.nbytes, free.options.damage * factor))


def trace_tensor(
    model_tensor: ModelTensor, stats: TensorStats, *, strict: bool = False, fine: bool = False, because: str = ""
) -> FreeTensor:
    """What a tensor could become, with bytes and damage.

    If even sixteen bits do damage that counts, as with inputs of very uneven scale, it may stay exactly as it is.

    Args:
        model_tensor: the tensor.
        stats: what errors of it cost.
        strict: a tensor of two or more dimensions never stays in float.
        fine: no row gets a coarser step than at plain 8 bits, absmax / 127.
        because: what is to be said of it on a grid.
    """
    tensor = model_tensor.tensor.detach()
    view = model_tensor.view
    matrix = view.matrix(tensor.float()).contiguous()
    ceiling = ceilings(tensor, view, model_tensor.normed)
    may_stay = not (strict and model_tensor.weight_like)
    in_half = may_stay and survives_float16(tensor)
    if in_half and 2 * tensor.numel() <= GRID_ENTRY:
        # As float16 it takes fewer bytes than on any grid.
        target, curve = plain_target(matrix, view, stats, ceiling), _NO_GRID
    else:
        scale = None if fine or not may_scale(model_tensor) else chosen_scales(matrix, view, stats)
        known = stats if scale is None else scaled_stats(stats, scale)
        target = make_target(matrix, view, known, ceiling, scale)
        curve = _without_idle_int16(trace(target, known))
    importance = plain_target(matrix, view, stats).importance
    plain: list[tuple[Decision, float, float]] = []  # with bytes and damage
    if fine:
        decision = Decision(model_tensor.name, "grid", plan.DEFAULT_BITS, because)
        coded = encoding.encode(model_tensor, decision)
        damage = _damage(view, importance, tensor.float() - coded.decode().float())
        curve = _finer_than_eight_bits(curve, target, coded.nbytes, damage)
        plain.append((decision, coded.nbytes + GRID_ENTRY, damage))
    own = plan.own_grid_of(model_tensor)
    if own is not None:
        plain.append((own, model_tensor.own_grid.nbytes + GRID_ENTRY, 0.0))  # type: ignore[union-attr]  # it has one
    if in_half:
        damage = _damage(view, importance, tensor.float() - tensor.half().float())
        plain.append((_in_float(model_tensor, "float16"), 2.0 * tensor.numel(), damage))
    if may_stay and own is None and min([*curve.damage, *(damage for _, _, damage in plain)]) > _MAX_DAMAGE_OF_FINEST:
        plain.append((_in_float(model_tensor, "exact"), float(tensor.numel() * tensor.element_size()), 0.0))
    nbytes = np.append(curve.nbytes + GRID_ENTRY + nbytes_of(target.scale), [nbytes for _, nbytes, _ in plain])
    options = Options(nbytes, np.append(curve.damage, [damage for _, _, damage in plain]))
    decisions = tuple(decision for decision, _, _ in plain)
    return FreeTensor(model_tensor, replace(target, judged=None), curve, options, decisions, because, may_stay)


def _in_float(model_tensor: ModelTensor, treatment: Treatment) -> Decision:
    return Decision(model_tensor.name, treatment, None, _WHY_FLOAT[treatment])


def may_scale(model_tensor: ModelTensor) -> bool:
    """Whether the columns of a tensor may have scales: if it is the weight of a linear layer, or a table like one."""
    module = model_tensor.module  # the attention that has a class of its own uses the weight without calling it
    taken = isinstance(module, (nn.Linear, nn.Embedding)) and not isinstance(module, NonDynamicallyQuantizableLinear)
    return taken and model_tensor.attribute == "weight" and model_tensor.normed is None and _is_matrix(model_tensor)


def _is_matrix(model_tensor: ModelTensor) -> bool:
    return model_tensor.tensor.dim() == 2 and model_tensor.view.rows == (0,)


def _damage(view: View, importance: Tensor, error: Tensor) -> float:
    """The damage of an error, float32 of the tensor's shape, where rows have that importance."""
    return float((importance * view.matrix(error.square()).double().mean(1)).sum())


def _finer_than_eight_bits(curve: RateCurve, target: RoundingTarget, nbytes: int, damage: float) -> RateCurve:
    """The int16 options at which no row has a coarser step than at plain 8 bits.

    Args:
        curve: all options.
        target: what the curve is of.
        nbytes: the size of the tensor at plain 8 bits; only options that take more are kept ...
        damage: ... and that do clearly less than this, the damage at plain 8 bits.
    """
    coarsest = target.absmax / CODE_LIMITS["int8"]
    worth = (curve.nbytes > nbytes) & (curve.damage * _MIN_GAIN_OF_INT16 < damage)
    wide = [i for i, codes in enumerate(curve.codes) if codes == "int16" and worth[i]]
    return curve.some([i for i in wide if bool((target.steps(int(curve.common[i]), "int16") <= coarsest).all())])


def _without_idle_int16(curve: RateCurve) -> RateCurve:
    """Without the int16 options that are hardly better than int8 at the same step."""
    options = list(zip(curve.common.tolist(), curve.codes, curve.damage, strict=True))
    of_int8 = {common: damage for common, codes, damage in options if codes == "int8"}
    return curve.some(
        [
            i
            for i, (common, codes, damage) in enumerate(options)
            if codes == "int8" or damage * _MIN_GAIN_OF_INT16 < of_int8[common]
        ]
    )


def rounded(free: FreeTensor, option: int) -> Coded:
    """Round a tensor as one of its options says."""
    if option >= len(free.curve.codes):
        return encoding.encode(free.model_tensor, free.decision(option))
    tensor, target = free.model_tensor.tensor.detach(), free.target
    code_type: CodeType = free.curve.codes[option]
    codes, steps = solve(target, target.steps(int(free.curve.common[option]), code_type), code_type)
    restored = target.view.restore(codes, tuple(tensor.shape)).contiguous()
    parts = {
        "codes": without_empty_slices(restored, tensor, free.model_tensor.normed),
        "step": steps.reshape(target.view.row_sizes),
    }
    if target.scale is not None:
        parts["scale"] = target.scale
    return Coded(Grid(code_type, scaled="scale" in parts), tuple(tensor.shape), tensor.dtype, parts, target.view)
