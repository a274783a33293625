"""What one tensor could become when its step is free: grids from fine to coarse, and floats, with bytes and damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from torch import Tensor

from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding import plan
from pared.fitting.rounding.curves import RateCurve, trace
from pared.fitting.rounding.importance import make_target
from pared.fitting.rounding.targets import CodeType, RoundingTarget, solve
from pared.fitting.search.allocate import Options
from pared.formats.coded import Coded, Grid, survives_float16
from pared.formats.grids import CODE_LIMITS
from pared.formats.views import view_of
from pared.model.contents import Decision, Treatment
from pared.model.tensors import Slot

# Overhead of an index entry for codes and steps, against one for plain values, in bytes (an estimate).
GRID_ENTRY: Final = 24
# Options of int16 are for where int8 loses: at the same step, by this factor in damage.
_WORTH_INT16: Final = 1.25
# Damage of the finest grid from which on a tensor may also stay as it is: a thousandth of what is lost unasked.
_COUNTS: Final = 1e-6
_WHY_FLOAT: Final[Mapping[Treatment, str]] = {
    "float16": "as float16 it does less damage in as few bytes than on a grid",
    "exact": "no grid is fine enough for it",
}


@dataclass(frozen=True, eq=False)
class FreeTensor:
    """A tensor whose step the allocation decides.

    Args:
        slot: the tensor.
        target: what rounding it needs.
        curve: its grids, from fine to coarse.
        options: bytes and damage: of the curve's grids, then of the plain ones.
        plain: what needs no search: plain 8 bits, or floats.
    """

    slot: Slot
    target: RoundingTarget
    curve: RateCurve
    options: Options
    plain: tuple[Decision, ...] = ()

    def decision(self, option: int) -> Decision:
        """What an option means, with its damage."""
        damage = float(self.options.damage[option])
        if option >= len(self.curve.codes):
            return replace(self.plain[option - len(self.curve.codes)], damage=damage)
        bits = 8 * float(self.options.nbytes[option]) / self.slot.tensor.numel()
        return Decision(self.slot.name, "grid", round(bits, 3), "", damage)


def trace_slot(slot: Slot, stats: TensorStats, *, strict: bool = False, fine: bool = False) -> FreeTensor:
    """What a tensor could become, and at what price.

    Where even sixteen bits do damage that counts, as with inputs of very uneven scale, it may stay exactly as it is.

    Args:
        slot: the tensor.
        stats: what errors of it cost.
        strict: a tensor of two or more dimensions never stays in float.
        fine: no row gets a coarser step than at plain 8 bits, absmax / 127.
    """
    tensor = slot.tensor.detach()
    view = view_of(slot.module, slot.attribute, tuple(tensor.shape))
    target = make_target(view.matrix(tensor.float()).contiguous(), view, stats)
    curve = _pruned(trace(target, stats))
    plain: list[Decision] = []
    extra: list[tuple[float, float]] = []  # bytes and damage of each of these
    if fine:
        plain.append(Decision(slot.name, "grid", plan.DEFAULT_BITS, ""))
        coded = plan.encode(slot, plain[-1])
        damage = _cost(target, tensor.float() - coded.decode().float())
        curve = _finer_than_eight_bits(curve, target, coded.nbytes, damage)
        extra.append((coded.nbytes + GRID_ENTRY, damage))
    may_stay = not (strict and slot.weight_like)
    if may_stay and survives_float16(tensor):
        plain.append(_in_float(slot, "float16"))
        extra.append((2.0 * tensor.numel(), _cost(target, tensor.float() - tensor.half().float())))
    if may_stay and min([*curve.damage, *(damage for _, damage in extra)]) > _COUNTS:
        plain.append(_in_float(slot, "exact"))
        extra.append((float(tensor.numel() * tensor.element_size()), 0.0))
    nbytes = np.append(curve.nbytes + GRID_ENTRY, [nbytes for nbytes, _ in extra])
    options = Options(nbytes, np.append(curve.damage, [damage for _, damage in extra]))
    return FreeTensor(slot, replace(target, judged=None), curve, options, tuple(plain))


def _in_float(slot: Slot, treatment: Treatment) -> Decision:
    return Decision(slot.name, treatment, None, _WHY_FLOAT[treatment])


def _cost(target: RoundingTarget, error: Tensor) -> float:
    """The damage of an error of the whole tensor."""
    return float((target.importance * target.view.matrix(error.square()).double().mean(1)).sum())


def _finer_than_eight_bits(curve: RateCurve, target: RoundingTarget, nbytes: int, damage: float) -> RateCurve:
    """The int16 options at which no row has a coarser step than at plain 8 bits, and which buy accuracy for bytes."""
    coarsest = target.absmax / CODE_LIMITS["int8"]
    worth = (curve.nbytes > nbytes) & (curve.damage * _WORTH_INT16 < damage)
    wide = [i for i, codes in enumerate(curve.codes) if codes == "int16" and worth[i]]
    return _some(curve, [i for i in wide if bool((target.steps(int(curve.common[i]), "int16") <= coarsest).all())])


def _some(curve: RateCurve, keep: Sequence[int]) -> RateCurve:
    """The options of these numbers."""
    chosen = np.array(keep, dtype=np.int64)
    return RateCurve(
        curve.common[chosen], tuple(curve.codes[i] for i in keep), curve.nbytes[chosen], curve.damage[chosen]
    )


def _pruned(curve: RateCurve) -> RateCurve:
    """Without the options of int16 that are hardly better than int8 at the same step."""
    narrow = {int(k): d for k, d, codes in zip(curve.common, curve.damage, curve.codes, strict=True) if codes == "int8"}
    keep = [
        i
        for i, codes in enumerate(curve.codes)
        if codes == "int8" or curve.damage[i] * _WORTH_INT16 < narrow[int(curve.common[i])]
    ]
    return _some(curve, keep)


def rounded(one: FreeTensor, option: int) -> Coded:
    """Round a tensor as one of its options says."""
    tensor = one.slot.tensor.detach()
    if option >= len(one.curve.codes):
        return plan.encode(one.slot, one.decision(option))
    codes_type: CodeType = one.curve.codes[option]
    steps = one.target.steps(int(one.curve.common[option]), codes_type)
    codes, steps = solve(one.target, steps, codes_type)
    view = one.target.view
    parts = {
        "codes": view.restore(codes, tuple(tensor.shape)).contiguous(),
        "step": steps.reshape(view.row_sizes),
    }
    return Coded(Grid(codes_type), tuple(tensor.shape), tensor.dtype, parts, view)
