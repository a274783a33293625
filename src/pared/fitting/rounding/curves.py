"""Rate-distortion curves: a tensor's bytes and damage at every step, from rounding a few of its rows at a few steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pared.fitting.calibration.blocks import Blocks
from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding.targets import (
    STEPS_PER_OCTAVE,
    Floats,
    RoundingTarget,
    blocks_of_groups,
    narrowed,
    of_blocks,
    round_rows,
    round_with_feedback,
)
from pared.formats import entropy
from pared.formats.grids import CODE_LIMITS, CodeType
from pared.formats.streams import encode_codes
from pared.formats.views import View

_KINDS: Final[tuple[CodeType, ...]] = ("int8", "int16")

# Weights in the rows that are rounded for a curve: with feedback, and without, which is faster. And the fewest rows.
_SAMPLED_WEIGHTS: Final = 1 << 16
_SAMPLED_WEIGHTS_PLAIN: Final = 1 << 19
_MIN_ROWS: Final = 128
_MIN_COLUMNS: Final = 1 << 13  # of a weight that is wide enough for several blocks of columns: some of them are sampled
_LARGE_GROUPS: Final = 8  # of which rows are sampled, where a group is too large to be rounded as a whole
# Steps that are tried, in octaves from the root mean square of the weights. Below them the laws of fine steps hold: an
# octave costs a bit, and the error is that of independent rounding (Bennett 1948), down to the finest step.
_TRIED: Final = tuple(i / 2 for i in range(-6, 5))
_FINEST: Final = -13.0
# Of tensors of at most this many weights all steps are tried: too few wide codes for a code table are stored as they
# are.
_TRIED_OF_FEW: Final = (*range(int(_FINEST), -3), *_TRIED)
_FEW_WEIGHTS: Final = 1 << 13
# Weights with heavy tails still take more than this rate, in bits, at the coarsest of these steps: then up to four
# octaves of coarser ones are tried.
_SMALL_RATE: Final = 0.25
_MAX_EXTRA_OCTAVES: Final = 4
_STEPS_AT_ONCE: Final = 1 << 18  # of rows at several common steps, to bound memory
_TABLE_NBYTES: Final = 64  # of a code table (an estimate)
_STREAM_ENTRY: Final = 8  # bytes of the index for one more stream (an estimate)
_TINY: Final = 1e-300  # instead of 0 in denominators and logarithms


@dataclass(frozen=True, eq=False)
class RateCurve:
    """The options of one tensor on grids, with the estimated bytes and damage of each.

    Args:
        common: int64 (options,): index of the common step, in eighths of an octave.
        codes: "int8" or "int16", for each option.
        nbytes: float64 (options,): bytes of codes and steps.
        damage: float64 (options,): expected, in the unit of `TensorStats.rows`.
    """

    common: NDArray[np.int64]
    codes: tuple[CodeType, ...]
    nbytes: Floats
    damage: Floats

    def some(self, options: Sequence[int]) -> RateCurve:
        """The options at these indices."""
        chosen = np.array(options, dtype=np.int64)
        codes = tuple(self.codes[i] for i in options)
        return RateCurve(self.common[chosen], codes, self.nbytes[chosen], self.damage[chosen])


def trace(target: RoundingTarget, stats: TensorStats) -> RateCurve:
    """Measure a tensor's curve.

    Rows are rounded with a factor from one half of the calls and judged by the other half: where there are few samples
    for many columns, the calls that a factor comes from make it look better than it is.
    """
    scale = float(target.mean_squares.mean().sqrt())
    if scale == 0:
        return RateCurve(np.zeros(1, np.int64), ("int8",), np.zeros(1), np.zeros(1))
    part = replace(narrowed(target, target.sampled), factored=target.judged)
    judge = None if stats.judge is None else of_blocks(target.layout, stats.judge, target.sampled)
    middle = round(STEPS_PER_OCTAVE * math.log2(scale))
    octaves = _TRIED_OF_FEW if target.matrix.numel() <= _FEW_WEIGHTS else _TRIED
    tried = [middle + round(STEPS_PER_OCTAVE * octave) for octave in octaves]
    coarsest = middle + STEPS_PER_OCTAVE * (_TRIED[-1] + _MAX_EXTRA_OCTAVES)
    rows = sample_rows(part)
    rates, errors = try_steps(part, rows, tried, judge)
    while rates[-1] > _SMALL_RATE and tried[-1] < coarsest:
        more = [tried[-1] + STEPS_PER_OCTAVE // 2, tried[-1] + STEPS_PER_OCTAVE]
        more_rates, more_errors = try_steps(part, rows, more, judge)
        tried, rates, errors = tried + more, np.append(rates, more_rates), np.append(errors, more_errors)
    common = np.arange(middle + round(STEPS_PER_OCTAVE * _FINEST), tried[-1] + 1)
    nbytes, damage = zip(*(_options(target, kind, common, tried, rates, errors) for kind in _KINDS), strict=True)
    codes = tuple(kind for kind in _KINDS for _ in common)
    return RateCurve(np.tile(common, len(_KINDS)), codes, np.concatenate(nbytes), np.concatenate(damage))


def sample_blocks(target: RoundingTarget, moments: Tensor | None) -> Tensor | None:
    """Blocks of columns to round for a curve, spread over all energies of their inputs; None: all.

    Blocks are rounded apart, so that a few tell as much of very many columns as a few rows of very many rows.

    Args:
        target: the tensor.
        moments: float32 (blocks, columns, columns): of the inputs; None: those of the weights stand in for them.

    Returns:
        int64 (some,): their indices, ascending.
    """
    layout, (rows, columns) = target.layout, target.matrix.shape
    width = -(-columns // layout.column_blocks)
    full = columns // width  # the last one may be filled up
    most = max(-(-_MIN_COLUMNS // width), _SAMPLED_WEIGHTS // (width * min(rows, _MIN_ROWS)))
    if full <= most:
        return None
    if moments is None:
        energies = target.matrix[:, : full * width].square().sum(0).unflatten(0, (full, width)).sum(1)
    else:
        energies = moments.diagonal(dim1=1, dim2=2).sum(1).unflatten(0, (layout.groups, -1)).sum(0)[:full]
    return _spread_out(energies, most)


def sample_rows(target: RoundingTarget) -> Tensor:
    """Rows to round for a curve, spread over all rates: whole groups, or some rows of a few large groups.

    Returns:
        int64 (some groups, rows of each): their indices.
    """
    rows, columns = target.matrix.shape
    groups = target.layout.groups
    sample = _SAMPLED_WEIGHTS if target.factored is not None else _SAMPLED_WEIGHTS_PLAIN
    spread = target.mean_squares.log2() / 2 - target.exponents / STEPS_PER_OCTAVE
    if groups == 1:
        return _spread_out(spread, max(1, min(rows, max(sample // columns, _MIN_ROWS))))[None]
    size = rows // groups
    wanted, each = max(1, min(groups, max(sample // (columns * size), _MIN_ROWS // size))), size
    if size > _MIN_ROWS and size * columns > sample:
        wanted = min(groups, _LARGE_GROUPS)
        each = max(1, min(size, max(sample // columns, _MIN_ROWS) // wanted))
    first = _spread_out(spread.reshape(-1, size).mean(1), wanted)
    return torch.stack([int(i) * size + _spread_out(spread[int(i) * size : (int(i) + 1) * size], each) for i in first])


def _spread_out(values: Tensor, wanted: int) -> Tensor:
    """The indices of some values that are evenly spaced among all of them when sorted: int64 (wanted,), ascending."""
    places = (torch.arange(wanted) + 0.5) * (len(values) / wanted)
    found: Tensor = values.argsort(stable=True)[places.long()].sort().values
    return found


def try_steps(target: RoundingTarget, rows: Tensor, tried: list[int], moments: Tensor | None) -> tuple[Floats, Floats]:
    """Round the sampled rows at several steps, all at once: rows are independent, so there is a copy of them per step.

    Args:
        target: the tensor.
        rows: int64 (some groups, rows of each): indices of the sampled rows.
        tried: common steps, in eighths of an octave.
        moments: float32 (blocks, columns, columns): judge the errors; None: all inputs count alike.

    Returns:
        bits per weight, and squared error relative to that of fine steps, each float64 (tried,).
    """
    groups, each = rows.shape
    steps = torch.cat([target.steps(common, "int16")[rows] for common in tried], dim=1)
    copies = rows.repeat(1, len(tried))
    if target.factored is not None:
        codes = round_with_feedback(target, copies, steps, CODE_LIMITS["int16"])
    else:
        flat = round_rows(target.some(copies.reshape(-1)), steps.reshape(-1), CODE_LIMITS["int16"])
        codes = flat.reshape(*copies.shape, -1)

    def by_step(values: Tensor) -> Tensor:  # (tried, rows, ...)
        split = values.reshape(groups, len(tried), each, *values.shape[2:]).transpose(0, 1)
        return split.reshape(len(tried), groups * each, *values.shape[2:])

    decoded = codes.reshape(copies.numel(), -1) * steps.reshape(-1, 1)
    error = by_step(row_errors(target, copies, decoded, moments))
    plain = by_step(steps.double().square() / 12)
    weight = target.importance[rows.reshape(-1)]
    errors = (weight * error).sum(1) / (weight * plain).sum(1).clamp(min=_TINY)
    narrow = by_step(codes.to(torch.int16)).numpy()
    scaled = target.scale is not None
    return np.array([rate(of_step, len(target.matrix), scaled=scaled) for of_step in narrow]), errors.numpy()


def row_errors(target: RoundingTarget, rows: Tensor, decoded: Tensor, moments: Tensor | None) -> Tensor:
    """The mean squared error of each row, weighted by the second moments of its inputs: float64, of the rows' shape.

    Args:
        target: the tensor.
        rows: int64 (some groups, rows of each): indices of the rows.
        decoded: float32 (rows, columns): what they have become, where columns have scales without these.
        moments: float32 (blocks, columns, columns), see `try_steps`.
    """
    error = target.some(rows.reshape(-1)) - decoded
    if moments is None:
        return error.double().square().mean(1).reshape(rows.shape)
    layout = target.layout
    if layout.groups > 1:
        moments = moments[blocks_of_groups(target, rows)]
        layout = Blocks(len(rows), layout.column_blocks)
    blocks = layout.blocks(error)
    energy = (torch.bmm(blocks, moments) * blocks).sum(2).double()
    trace = moments.diagonal(dim1=1, dim2=2).sum(1).double()[:, None].expand_as(energy)
    total, norm = (t.reshape(layout.groups, layout.column_blocks, -1).sum(1) for t in (energy, trace))
    return torch.where(norm > 0, total / norm.clamp(min=_TINY), torch.zeros_like(total))


def rate(codes: NDArray[np.int16], rows: int, *, scaled: bool = False) -> float:
    """Bits per code that the entropy coder would take for a matrix of which these rows are a sample.

    Code tables take the same bytes for many rows as for few, so they are not scaled up.

    Args:
        codes: int16 (sampled rows, columns).
        rows: the number of rows of the whole matrix.
        scaled: whether columns have scales, and their codes classes.
    """
    narrow = codes.astype(np.int8) if np.abs(codes).max(initial=0) <= CODE_LIMITS["int8"] else codes
    streams = encode_codes(narrow, View(codes.shape, (1,) if scaled else (0,)))
    classes = len(streams.pop("classes").payload) if scaled and "classes" in streams else 0
    total = sum(len(part.payload) for part in streams.values())
    tables = min(_TABLE_NBYTES * len(streams), total / 2)
    fixed = tables + _STREAM_ENTRY * (len(streams) - 1) + classes
    return float(8 * ((total - tables) * rows / len(codes) + fixed) / (rows * codes.shape[1]))


def _options(
    target: RoundingTarget, codes: CodeType, common: NDArray[np.int64], tried: list[int], rates: Floats, errors: Floats
) -> tuple[Floats, Floats]:
    """Bytes and damage at each common step: the measured curve, shifted where rows need a coarser step than that."""
    rows, columns = target.matrix.shape
    live = target.absmax > 0
    # NumPy: it is quicker than torch for arrays as short as these.
    weight, exponents = target.importance[live].numpy(), target.exponents[live].numpy()
    nbytes, damage = [], []
    some = common[:: STEPS_PER_OCTAVE // 2] if len(common) > STEPS_PER_OCTAVE else common
    for together in torch.from_numpy(some).split(max(1, _STEPS_AT_ONCE // max(rows, 1))):
        steps = target.steps(together[:, None], codes)[:, live].numpy().astype(np.float64)
        index = STEPS_PER_OCTAVE * np.log2(steps)
        effective = (index - exponents).mean(1)  # the common step that would take as many bits
        below = np.maximum(0.0, tried[0] - effective) / STEPS_PER_OCTAVE  # a bit for each octave below the finest tried
        bits = np.interp(effective, tried, rates) + below
        relative_error = np.interp(effective, tried, errors)
        rounded = np.rint(index).astype(np.int16)
        step_bits = np.array([entropy.entropy(of_step) * len(of_step) for of_step in rounded])  # as coded, estimated
        nbytes.append(bits * rows * columns / 8 + step_bits / 8)
        damage.append(relative_error * (weight * steps**2 / 12).sum(1))
    # Between these steps bytes and the logarithm of the damage are nearly straight.
    lowered = np.log(np.maximum(np.concatenate(damage), _TINY))
    return np.interp(common, some, np.concatenate(nbytes)), np.exp(np.interp(common, some, lowered))
