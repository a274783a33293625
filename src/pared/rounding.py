"""What each tensor could become: bytes and damage at every step, from rounding a few of its rows at a few steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pared import entropy
from pared.feedback import Factor, factor, feedback
from pared.formats import log_step
from pared.grids import CODE_LIMITS
from pared.sensitivity import Layout, TensorStats
from pared.streams import encode_codes
from pared.views import View

STEPS_PER_OCTAVE: Final = 8  # of the scale that steps are on

Codes = Literal["int8", "int16"]
Floats = NDArray[np.float64]

_KINDS: Final[tuple[Codes, ...]] = ("int8", "int16")

# Rows are rounded for a curve until so many weights are at hand.
_SAMPLE: Final = 1 << 16
_PLAIN_SAMPLE: Final = 1 << 19  # without feedback
# Steps that are tried, in octaves of the root mean square of the weights. Below them the laws of fine steps hold: an
# octave costs a bit, and the error is that of independent rounding (Bennett 1948).
_TRIED: Final = tuple(i / 2 for i in range(-6, 5))
_FINEST: Final = -13.0
# Of few weights all steps are tried: wide codes of which there are too few for a table are stored as they are.
_TRIED_OF_FEW: Final = (*range(int(_FINEST), -3), *_TRIED)
_FEW: Final = 1 << 13
# Heavy tails have a rate left there: then coarser steps are tried, half an octave each, until that is small.
_MORE_TRIED: Final = 4
_SMALL_RATE: Final = 0.25  # bits
_JUDGED_AT: Final = -1.0  # octaves, where ways to round are compared: about three bits
DAMPINGS: Final = (0.015, 0.05, 0.12, 0.3, 1.5)  # from the middle one the search goes to where it is better
# The most that a code of int8 may reach before feedback: it moves later columns, and rows that leave the range are
# solved again.
HEADROOM: Final = {"int8": 120, "int16": 32000}
_LEAST_ROWS: Final = 128
_TABLE: Final = 64  # bytes of a code table, about
_PART: Final = 8  # bytes of the index about one more stream, about
# Importances are estimates: a row counts at least this share of the mean one.
_LEAST_IMPORTANCE: Final = 0.02
# Tables: the steps of rows follow this power of the optimum, since counts say less of other texts than of this one.
_TABLE_POWER: Final = 0.75


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor that may go on a grid, and what is known of it.

    Args:
        matrix: float32 (rows, columns): its view.
        view: of the tensor.
        importance: float64 (rows,): damage per unit variance of all elements of a row, shrunk and never zero.
        exponents: int64 (rows,): how many eighths of an octave a row's step is above the tensor's common one.
        factored: of its second moments; None: plain rounding.
        judged: the same from those calls that do not judge it; dropped when the curve is known.
        layout: of the moments' blocks.
        absmax: float32 (rows,): the largest magnitude of each row.
    """

    matrix: Tensor
    view: View
    importance: Tensor
    exponents: Tensor
    factored: Factor | None
    judged: Factor | None
    layout: Layout
    absmax: Tensor

    def steps(self, common: int, codes: Codes) -> Tensor:
        """The steps at a common exponent: 2^((common + exponent) / 8), or coarser where a code would leave its type.

        Returns:
            float32 (rows,); 0 for rows that are zero.
        """
        # A hair below the member of the table that is meant, so that rounding up finds it.
        wished = torch.exp2((common + self.exponents).double() / STEPS_PER_OCTAVE).mul_(1 - 1e-6).float()
        least = self.absmax / HEADROOM[codes]
        return torch.where(self.absmax > 0, log_step(torch.maximum(wished, least)), torch.zeros_like(wished))


def make_target(matrix: Tensor, view: View, stats: TensorStats) -> Target:
    """Gather what rounding a tensor needs.

    Args:
        matrix: float32, the view's matrix of the tensor.
        view: of the tensor.
        stats: what calibration says of it.
    """
    importance, power = _importance(stats)
    exponents = _exponents(importance, matrix.shape[1], power)
    absmax = matrix.abs().amax(1)
    plain = Target(matrix, view, importance, exponents, None, None, stats.layout, absmax)
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


def _damped(target: Target, moments: Tensor, judge: Tensor | None) -> tuple[float, Target]:
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


def _merit(target: Target, judge: Tensor | None) -> float:
    """Bits per weight at equal damage, up to what all ways to round a tensor share; at about three bits."""
    scale = float(target.matrix.square().mean().sqrt())
    common = round(STEPS_PER_OCTAVE * (math.log2(scale) + _JUDGED_AT))
    rows = _sample_rows(target)
    rates, errors = _try(target, rows, [common], judge)
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


def solve(target: Target, steps: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Round the whole matrix.

    Returns:
        codes (rows, columns) of the type asked for, and the steps (rows,): raised where feedback drove a code out of
        its type.
    """
    limit = CODE_LIMITS[codes]
    kind = torch.int8 if codes == "int8" else torch.int16
    if target.factored is None:
        return round_rows(target.matrix, steps, limit).to(kind), steps
    found = torch.empty(target.matrix.shape, dtype=kind)
    rows = torch.arange(len(found))
    steps = steps.clone()
    while len(rows):
        part = _with_feedback(target, rows, steps[rows], limit)
        found[rows] = part.to(kind)
        # Rows are independent: only those that may have been cut off are solved again, with a larger step.
        cut = part.abs().amax(1) >= limit
        rows = rows[cut] if target.layout.groups == 1 else _whole_groups(rows[cut], target)
        if len(rows) and target.layout.groups > 1:
            cut = (found[rows].abs() >= limit).any(1)
            steps[rows[cut]] = log_step(steps[rows[cut]] * _RAISE)
        else:
            steps[rows] = log_step(steps[rows] * _RAISE)
    return found, steps


_RAISE: Final = 1.02  # up to the next member of the table of steps


def _whole_groups(rows: Tensor, target: Target) -> Tensor:
    """All rows of the groups that these rows belong to."""
    size = len(target.matrix) // target.layout.groups
    groups = torch.unique(rows // size)
    found: Tensor = (groups[:, None] * size + torch.arange(size)).reshape(-1)
    return found


def round_rows(matrix: Tensor, steps: Tensor, limit: int) -> Tensor:
    """The nearest codes, float32 (rows, columns)."""
    inverse = torch.where(steps > 0, steps.reciprocal(), torch.zeros_like(steps))
    return (matrix * inverse[:, None]).round_().clamp_(-limit, limit)


def _with_feedback(target: Target, rows: Tensor, steps: Tensor, limit: int) -> Tensor:
    """Feedback on some rows: all of some groups, or any of a matrix that is one group."""
    assert target.factored is not None
    whole = target.layout
    groups = len(rows) * whole.groups // len(target.matrix) if whole.groups > 1 else 1
    layout = Layout(groups, whole.parts)
    factored = target.factored
    if groups != whole.groups:
        size = len(target.matrix) // whole.groups
        chosen = rows[::size] // size
        blocks = (chosen[:, None] * whole.parts + torch.arange(whole.parts)).reshape(-1)
        factored = factored.some(blocks)
    blocks_of = layout.blocks(target.matrix[rows])
    codes = feedback(blocks_of, factored, layout.row_blocks(steps).contiguous(), limit)
    return layout.matrix(codes, target.matrix.shape[1])


@dataclass(frozen=True, eq=False)
class Curve:
    """Options of one tensor: at each, about what it takes and what it costs.

    Args:
        common: int64: the exponent of the common step, in eighths of an octave.
        codes: of each option, "int8" or "int16".
        nbytes: bytes of codes and steps.
        damage: expected, in the unit of `TensorStats.rows`.
    """

    common: NDArray[np.int64]
    codes: tuple[Codes, ...]
    nbytes: Floats
    damage: Floats


def trace(target: Target, stats: TensorStats) -> Curve:
    """Measure a tensor's curve.

    Rows are rounded with a factor from one half of the calls and judged by the other half, since a factor flatters
    itself where there are few samples for many columns.
    """
    scale = float(target.matrix.square().mean().sqrt())
    if scale == 0:
        return Curve(np.zeros(1, np.int64), ("int8",), np.zeros(1), np.zeros(1))
    target = replace(target, factored=target.judged)
    middle = round(STEPS_PER_OCTAVE * math.log2(scale))
    octaves = _TRIED_OF_FEW if target.matrix.numel() <= _FEW else _TRIED
    tried = [middle + round(STEPS_PER_OCTAVE * octave) for octave in octaves]
    rows = _sample_rows(target)
    rates, errors = _try(target, rows, tried, stats.judge)
    while rates[-1] > _SMALL_RATE and tried[-1] < middle + STEPS_PER_OCTAVE * (_TRIED[-1] + _MORE_TRIED):
        coarser = [tried[-1] + STEPS_PER_OCTAVE // 2, tried[-1] + STEPS_PER_OCTAVE]
        more_rates, more_errors = _try(target, rows, coarser, stats.judge)
        tried, rates, errors = tried + coarser, np.append(rates, more_rates), np.append(errors, more_errors)
    common = np.arange(middle + round(STEPS_PER_OCTAVE * _FINEST), tried[-1] + 1)
    parts = [_options(target, codes, common, tried, rates, errors) for codes in _KINDS]
    kinds = [codes for codes in _KINDS for _ in common]
    return Curve(np.concatenate([common, common]), tuple(kinds), *(np.concatenate(p) for p in zip(*parts, strict=True)))


def _sample_rows(target: Target) -> Tensor:
    """Rows, or whole groups of rows, that hold about `_SAMPLE` weights and are spread over all rates."""
    rows, columns = target.matrix.shape
    group = rows // target.layout.groups if target.layout.groups > 1 else 1
    sample = _SAMPLE if target.factored is not None else _PLAIN_SAMPLE
    wanted = max(1, min(rows // group, max(sample // (columns * group), _LEAST_ROWS // group)))
    spread = target.matrix.square().mean(1).log2() / 2 - target.exponents / STEPS_PER_OCTAVE
    order = spread.reshape(-1, group).mean(1).argsort(stable=True)
    places = (torch.arange(wanted) + 0.5) * (rows / group / wanted)
    first = order[places.long()].sort().values
    found: Tensor = (first[:, None] * group + torch.arange(group)).reshape(-1)
    return found


def _try(target: Target, rows: Tensor, tried: list[int], moments: Tensor | None) -> tuple[Floats, Floats]:
    """Bits per weight, and squared error relative to that of fine steps, at each step, from the sampled rows.

    Rows are independent, so all steps are tried at once: as so many copies of the rows.
    """
    steps = torch.cat([target.steps(common, "int16")[rows] for common in tried])
    copies = rows.repeat(len(tried))
    if target.factored is not None:
        codes = _with_feedback(target, copies, steps, CODE_LIMITS["int16"])
    else:
        codes = round_rows(target.matrix[copies], steps, CODE_LIMITS["int16"])
    error = _row_errors(target, copies, codes, steps, moments).reshape(len(tried), -1)
    plain = (steps.double().square() / 12).reshape(len(tried), -1)
    weight = target.importance[rows]
    errors = (weight * error).sum(1) / (weight * plain).sum(1).clamp(min=1e-300)
    narrow = codes.to(torch.int16).reshape(len(tried), len(rows), -1).numpy()
    return np.array([rate(one, len(target.matrix)) for one in narrow]), errors.numpy()


def _row_errors(target: Target, rows: Tensor, codes: Tensor, steps: Tensor, moments: Tensor | None) -> Tensor:
    """The mean squared error of each row, weighted by the second moments of its inputs: float64 (rows,)."""
    error = target.matrix[rows] - codes * steps[:, None]
    if moments is None:
        return error.double().square().mean(1)
    layout, size = target.layout, len(target.matrix) // target.layout.groups
    if layout.groups > 1:
        chosen = (rows[::size] // size)[:, None] * layout.parts + torch.arange(layout.parts)
        moments = moments[chosen.reshape(-1)]
        layout = Layout(len(rows) // size, layout.parts)
    blocks = layout.blocks(error)
    energy = (torch.bmm(blocks, moments) * blocks).sum(2).double()
    trace = moments.diagonal(dim1=1, dim2=2).sum(1).double()[:, None].expand_as(energy)
    total, norm = (t.reshape(layout.groups, layout.parts, -1).sum(1).reshape(-1) for t in (energy, trace))
    return torch.where(norm > 0, total / norm.clamp(min=1e-300), torch.zeros_like(total))


def rate(codes: NDArray[np.int16], rows: int) -> float:
    """Bits per code that the coder would take for `rows` rows of which these are a sample.

    Its tables cost the same for many rows as for few: they are left out of what is scaled up.
    """
    narrow = codes.astype(np.int8) if np.abs(codes).max(initial=0) <= CODE_LIMITS["int8"] else codes
    streams = encode_codes(narrow, View(codes.shape, (0,)))
    total = sum(len(part.payload) for part in streams.values())
    tables = min(_TABLE * len(streams), total / 2)
    fixed = tables + _PART * (len(streams) - 1)
    return float(8 * ((total - tables) * rows / len(codes) + fixed) / (rows * codes.shape[1]))


def _options(
    target: Target, codes: Codes, common: NDArray[np.int64], tried: list[int], rates: Floats, errors: Floats
) -> tuple[Floats, Floats]:
    """Bytes and damage at each common step: the measured curve, shifted by what each row's bound moves it."""
    rows, columns = target.matrix.shape
    live = target.absmax > 0
    # Small numbers of numbers: numpy is quicker than torch.
    weight, exponents = target.importance[live].numpy(), target.exponents[live].numpy()
    nbytes, damage = [], []
    some = common[:: STEPS_PER_OCTAVE // 2] if len(common) > STEPS_PER_OCTAVE else common
    for k in some:
        steps = target.steps(int(k), codes)[live].numpy().astype(np.float64)
        index = STEPS_PER_OCTAVE * np.log2(steps)
        effective = float((index - exponents).mean())  # the common step that would cost as much
        bits = _at(effective, tried, rates)
        share = float(np.interp(effective, tried, errors))
        nbytes.append(bits * rows * columns / 8 + _step_bytes(index))
        damage.append(share * float((weight * steps**2 / 12).sum()))
    # Between these the curve is as good as straight, the damage on a log scale.
    return np.interp(common, some, nbytes), np.exp(np.interp(common, some, np.log(np.maximum(damage, 1e-300))))


def _at(common: float, tried: list[int], rates: Floats) -> float:
    """The rate at a step: measured, or a bit more for each octave below."""
    below = max(0.0, tried[0] - common) / STEPS_PER_OCTAVE
    return float(np.interp(common, tried, rates)) + below


def _step_bytes(index: Floats) -> float:
    """About what steps with these places on the scale take in the coder."""
    return entropy.entropy(np.rint(index).astype(np.int16)) * len(index) / 8
