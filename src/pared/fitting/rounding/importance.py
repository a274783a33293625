"""What the rows of a tensor count, and the damping that rounds it best."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding.curves import sample_rows, try_steps
from pared.fitting.rounding.feedback import factor
from pared.fitting.rounding.targets import STEPS_PER_OCTAVE, RoundingTarget
from pared.formats.views import View

_JUDGED_AT: Final = -1.0  # octaves, where ways to round are compared: about three bits


DAMPINGS: Final = (0.015, 0.05, 0.12, 0.3, 1.5)  # from the middle one the search goes to where it is better


# Importances are estimates: a row counts at least this share of the mean one.
_LEAST_IMPORTANCE: Final = 0.02


# Tables: the steps of rows follow this power of the optimum, since counts say less of other texts than of this one.
_TABLE_POWER: Final = 0.75


def make_target(matrix: Tensor, view: View, stats: TensorStats) -> RoundingTarget:
    """Gather what rounding a tensor needs.

    Args:
        matrix: float32, the view's matrix of the tensor.
        view: of the tensor.
        stats: what calibration says of it.
    """
    importance, power = _importance(stats)
    exponents = _exponents(importance, matrix.shape[1], power)
    absmax = matrix.abs().amax(1)
    plain = RoundingTarget(matrix, view, importance, exponents, None, None, stats.layout, absmax)
    if not bool((absmax > 0).any()):
        return plain
    candidates = [plain]
    if bool(exponents.any()):
        candidates.append(replace(plain, exponents=torch.zeros_like(exponents)))
    judge = stats.judge
    best = min(candidates, key=lambda target: _merit(target, judge))
    if stats.moments is None:
        return best
    seen = stats.moments if stats.unseen is None else stats.moments - stats.unseen
    damping, judged = _damped(best, seen, judge)
    if _merit(judged, judge) >= _merit(best, judge):
        return best
    return replace(best, factored=factor(stats.moments, damping), judged=judged.factored)


def _damped(target: RoundingTarget, moments: Tensor, judge: Tensor | None) -> tuple[float, RoundingTarget]:
    """The damping of `DAMPINGS` that is better than its neighbours, and the target with it.

    Only the best target is held on to: wide weights have factors of a gigabyte.
    """
    merits: dict[int, float] = {}
    place, best = len(DAMPINGS) // 2, target
    while True:
        for one in (place, place - 1, place + 1):
            if one not in merits and 0 <= one < len(DAMPINGS):
                damped = replace(target, factored=factor(moments, DAMPINGS[one]))
                merit = _merit(damped, judge)
                if merit < min(merits.values(), default=math.inf):
                    best = damped
                merits[one] = merit
        found = min(merits, key=merits.__getitem__)
        if found == place:
            return DAMPINGS[place], best
        place = found


def _merit(target: RoundingTarget, judge: Tensor | None) -> float:
    """Bits per weight at equal damage, up to what all ways to round a tensor share; at about three bits."""
    scale = float(target.matrix.square().mean().sqrt())
    common = round(STEPS_PER_OCTAVE * (math.log2(scale) + _JUDGED_AT))
    rows = sample_rows(target)
    rates, errors = try_steps(target, rows, [common], judge)
    steps = target.steps(common, "int16")[rows].double()
    damage = float(errors[0]) * float((target.importance[rows] * steps.square()).sum())
    return float(rates[0]) + 0.5 * math.log2(max(damage, 1e-300))


def _importance(stats: TensorStats) -> tuple[Tensor, float]:
    if stats.uses is not None and float(stats.uses.sum()) > 0 and stats.moments is None:
        return table_importance(stats.rows, stats.uses), _TABLE_POWER
    seen = stats.rows[stats.rows > 0]
    if not len(seen):
        return torch.full_like(stats.rows, _NEGLIGIBLE), 1.0
    # A row that calibration never reached may matter elsewhere: it counts like the median one that it did.
    rows = torch.where(stats.rows > 0, stats.rows, seen.median())
    return rows.clamp(min=_LEAST_IMPORTANCE * float(rows.mean())), 1.0


# What a tensor without any measured effect on the output counts: little, so that it ends coarse but not empty.
_NEGLIGIBLE: Final = 1e-6


def table_importance(rows: Tensor, uses: Tensor) -> Tensor:
    """The expected importance of a table's rows, given the measured one and how often each was looked up.

    Rows that were looked up about as often count alike, by their mean. Rows that never were get the share of those
    looked up once (Good 1953); and all up to the median of the seen ones count alike, so that what was not in the
    calibration data never gets a coarser step than what is ordinary there.

    >>> uses = torch.tensor([0.0, 0.0, 1.0, 1.0, 8.0])
    >>> table_importance(uses, uses).tolist()
    [1.0, 1.0, 1.0, 1.0, 8.0]
    """
    octave = uses.clamp(min=0.5).log2().floor().long() + 1
    total = torch.zeros(int(octave.max()) + 1, dtype=rows.dtype).index_add_(0, octave, rows)
    mean = (total / torch.bincount(octave).clamp(min=1))[octave]
    ordinary = uses <= uses[uses > 0].median()
    share = (rows[ordinary].sum() + rows[uses == 1].sum()) / ordinary.sum()
    return torch.where(ordinary, share, mean.clamp(min=float(share)))


def _exponents(importance: Tensor, columns: int, power: float) -> Tensor:
    """Steps follow importance^(-1/2), so that every weight does the same damage; in eighths of an octave.

    Short rows have coarser exponents: a row's own step costs bytes too.
    """
    unit = next(unit for least, unit in ((256, 2), (32, 4), (0, 8)) if columns >= least)
    wished = -0.5 * power * STEPS_PER_OCTAVE * (importance / importance.log().mean().exp()).log2()
    return (wished / unit).round().long().mul_(unit)
