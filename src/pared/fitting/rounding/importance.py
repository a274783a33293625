"""How much errors in each row of a tensor matter, and the damping that rounds it best."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding.curves import sample_blocks, sample_rows, try_steps
from pared.fitting.rounding.feedback import factor
from pared.fitting.rounding.targets import STEPS_PER_OCTAVE, RoundingTarget, narrowed, of_blocks
from pared.formats.views import View
from pared.model.tensors import ModelTensor

# Step at which ways to round a tensor are compared, in octaves from the root mean square: about three bits per weight.
_COMPARED_AT: Final = -1.0
# Shares of the mean second moment that are tried, from the middle one on towards the better ones, see `factor`.
DAMPINGS: Final = (0.015, 0.05, 0.12, 0.3, 1.5)
# Shares of the inputs' own moments that are tried. Those of gradients come from few directions: they say which samples
# count, and the inputs' own say how the inputs go together.
_SHARES: Final = (0.0, 0.8)
# Importances are estimates: a row has at least this share of the mean one.
_MIN_IMPORTANCE: Final = 0.02
# Importance of a tensor without any measured effect on the output: so small that it ends coarse, but not empty.
_NEGLIGIBLE: Final = 1e-6
# Steps of a table's rows follow this power of the optimum: how often a row is looked up varies from text to text.
_TABLE_POWER: Final = 0.75
_EXPERTS_SHOWN: Final = 8  # with the fewest tokens
# Resolution of the rows' exponents, in eighths of an octave, for rows of at least this many columns. Short rows have
# coarser exponents, because a row's step takes bytes too.
_RESOLUTIONS: Final = ((256, 2), (32, 4), (0, 8))


def make_target(
    matrix: Tensor,
    view: View,
    stats: TensorStats,
    ceiling: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    whole: bool = False,
) -> RoundingTarget:
    """Gather what is needed to round a tensor, and choose between equal and unequal steps and the damping.

    Args:
        matrix: float32 (rows, columns): the tensor through its view.
        view: which dimensions are rows.
        stats: what errors of the tensor cost, once its columns are divided by their scales.
        ceiling: float32 (rows,): no step is above this.
        scale: float32 (columns,); None: columns have no scales.
        whole: let `judged` cover all columns, however many there are.
    """
    plain = plain_target(matrix, view, stats, ceiling, scale)
    exponents = plain.exponents
    if not bool((plain.absmax > 0).any()):
        return plain
    blocks = None if whole else sample_blocks(plain, stats.judge)
    candidates = [narrowed(plain, blocks)]
    if bool(exponents.any()):
        candidates.append(replace(candidates[0], exponents=torch.zeros_like(exponents)))
    judge = None if stats.judge is None else of_blocks(plain.layout, stats.judge, blocks)
    bits_of = [bits_at_equal_damage(target, judge) for target in candidates]
    fewest = min(bits_of)
    best = candidates[bits_of.index(fewest)]
    plain = replace(plain, exponents=best.exponents, sampled=blocks)
    if stats.moments is None:
        return plain
    seen = of_blocks(plain.layout, stats.moments, blocks)
    if stats.unseen is not None:
        seen = seen - of_blocks(plain.layout, stats.unseen, blocks)
    found = []
    for share in (0.0,) if stats.inputs is None else _SHARES:
        bits, damping, judged = _damped(best, _mixed(seen, stats.inputs, share), judge)
        found.append((bits, share, damping, judged.factored))
    bits, share, damping, judged_factor = min(found, key=lambda one: one[0])
    if bits >= fewest:
        return plain
    factored = factor(_mixed(stats.moments, stats.inputs, share), damping).halved()
    return replace(plain, factored=factored, judged=judged_factor)


def _mixed(moments: Tensor, inputs: Tensor | None, share: float) -> Tensor:
    """Moments with a share of those of the inputs, at equal traces; each float32 (blocks, columns, columns)."""
    if inputs is None or share == 0:
        return moments
    trace, of_inputs = (t.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] for t in (moments, inputs))
    return (1 - share) * moments + share * inputs * (trace / of_inputs.clamp(min=torch.finfo(torch.float32).tiny))


def plain_target(
    matrix: Tensor, view: View, stats: TensorStats, ceiling: Tensor | None = None, scale: Tensor | None = None
) -> RoundingTarget:
    """What is needed to round a tensor without feedback, and with steps as its rows' importance asks; as above."""
    importance, power = _importance(stats)
    exponents = _exponents(importance, matrix.shape[1], power)
    absmax = (matrix if scale is None else matrix / scale).abs().amax(1)
    return RoundingTarget(matrix, view, importance, exponents, None, None, stats.layout, absmax, ceiling, scale=scale)


def _damped(target: RoundingTarget, moments: Tensor, judge: Tensor | None) -> tuple[float, float, RoundingTarget]:
    """The damping that is better than its neighbours in `DAMPINGS`, after its bits, and the target with a factor of it.

    Only the best target is kept in memory: the factor of a wide weight may take a gigabyte.
    """
    bits: dict[int, float] = {}  # by the index of the damping
    index, best = len(DAMPINGS) // 2, target
    while True:
        for neighbour in (index, index - 1, index + 1):
            if neighbour in bits or not 0 <= neighbour < len(DAMPINGS):
                continue
            damped = replace(target, factored=factor(moments, DAMPINGS[neighbour]))
            fewest_so_far = min(bits.values(), default=math.inf)
            bits[neighbour] = bits_at_equal_damage(damped, judge)
            if bits[neighbour] < fewest_so_far:
                best = damped
        fewest = min(bits, key=bits.__getitem__)
        if fewest == index:
            return bits[index], DAMPINGS[index], best
        index = fewest


def bits_at_equal_damage(target: RoundingTarget, judge: Tensor | None) -> float:
    """Bits per weight at equal damage, up to a constant that all ways to round a tensor share; fewer is better."""
    scale = float(target.mean_squares.mean().sqrt())
    common = round(STEPS_PER_OCTAVE * (math.log2(scale) + _COMPARED_AT))
    rows = sample_rows(target)
    rates, errors = try_steps(target, rows, [common], judge)
    steps = target.steps(common, "int16")[rows].double()
    damage = float(errors[0]) * float((target.importance[rows] * steps.square()).sum())
    return float(rates[0]) + 0.5 * math.log2(max(damage, 1e-300))


def unreached(model_tensor: ModelTensor, stats: TensorStats | None) -> str:
    """What a report says of a weight, or of matrices of a stack, on which no output was seen to depend; else nothing.

    Args:
        model_tensor: the tensor.
        stats: what was measured of it; None if nothing was.
    """
    if model_tensor.kind != "parameter" or not model_tensor.weight_like:
        return ""
    if stats is not None and stats.tokens is not None:
        return _rarely(stats.tokens, model_tensor.view.n_columns)
    if stats is None or not bool((stats.rows > 0).any()):
        return "calibration saw no effect of it: it counts like the median of the others"
    groups = model_tensor.groups or 1
    idle = int((stats.rows.reshape(groups, -1).amax(1) <= 0).sum())
    if not idle:
        return ""
    return (
        f"calibration saw no effect of {idle} of its {groups} matrices: their rows count like the median of the others"
    )


def _rarely(tokens: Tensor, columns: int) -> str:
    """What a report says of experts that got fewer tokens than their matrix has columns; nothing if there are none.

    The second moments of fewer inputs than columns say nothing of some directions.
    """
    few = [(int(count), place) for place, count in enumerate(tokens.tolist()) if count < columns]
    if not few:
        return ""
    if len(tokens) == 1:
        return (
            f"calibration gave this expert {few[0][0]} tokens, fewer than {columns}: the others of its layer count, too"
        )
    listed = ", ".join(f"{place} ({count})" for count, place in sorted(few)[:_EXPERTS_SHOWN])
    more = f" and {len(few) - _EXPERTS_SHOWN} more" if len(few) > _EXPERTS_SHOWN else ""
    return (
        f"calibration gave {len(few)} of its {len(tokens)} experts fewer than {columns} tokens, for which all of them "
        f"count, too: {listed}{more}"
    )


def _importance(stats: TensorStats) -> tuple[Tensor, float]:
    """The importance of each row, float64 (rows,), and the power of the optimum that steps follow."""
    if stats.uses is not None and float(stats.uses.sum()) > 0:  # also of a table that is the head as well
        return table_importance(stats.rows, stats.uses), _TABLE_POWER
    reached = stats.rows[stats.rows > 0]
    if not len(reached):
        return torch.full_like(stats.rows, _NEGLIGIBLE), 1.0
    # A row that calibration did not reach may matter on other data: it counts like the median of the others.
    rows = torch.where(stats.rows > 0, stats.rows, reached.median())
    return rows.clamp(min=_MIN_IMPORTANCE * float(rows.mean())), 1.0


def table_importance(rows: Tensor, uses: Tensor) -> Tensor:
    """The expected importance of a table's rows, given the measured one and how often each row was looked up.

    Rows that were looked up about equally often get the mean importance of all of them. Rows that were never looked up
    get the share of those looked up once (Good 1953). All rows up to the median of the rows looked up count alike, so
    that what the calibration data lack never gets a coarser step than what is ordinary in them.

    Args:
        rows: float64 (rows,): measured importance.
        uses: float64 (rows,): how often each row was looked up.

    Returns:
        float64 (rows,), above 0.

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
    """By how many eighths of an octave each row's step exceeds the common one, int64 (rows,).

    Steps follow importance^(-1/2), so that every weight does the same damage.
    """
    unit = next(unit for least, unit in _RESOLUTIONS if columns >= least)
    wished = -0.5 * power * STEPS_PER_OCTAVE * (importance / importance.log().mean().exp()).log2()
    return (wished / unit).round().long().mul_(unit)
