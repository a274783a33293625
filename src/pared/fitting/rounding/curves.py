"""What each tensor could become: bytes and damage at every step, from rounding a few of its rows at a few steps."""

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
    CodeType,
    Floats,
    RoundingTarget,
    round_rows,
    round_with_feedback,
)
from pared.formats import entropy
from pared.formats.grids import CODE_LIMITS
from pared.formats.streams import encode_codes
from pared.formats.views import View

_KINDS: Final[tuple[CodeType, ...]] = ("int8", "int16")

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
_LEAST_ROWS: Final = 128
_TABLE: Final = 64  # bytes of a code table, about
_PART: Final = 8  # bytes of the index about one more stream, about


@dataclass(frozen=True, eq=False)
class RateCurve:
    """Options of one tensor: at each, about what it takes and what it costs.

    Args:
        common: int64: the exponent of the common step, in eighths of an octave.
        codes: of each option, "int8" or "int16".
        nbytes: bytes of codes and steps.
        damage: expected, in the unit of `TensorStats.rows`.
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

    Rows are rounded with a factor from one half of the calls and judged by the other half, since a factor flatters
    itself where there are few samples for many columns.
    """
    scale = float(target.matrix.square().mean().sqrt())
    if scale == 0:
        return RateCurve(np.zeros(1, np.int64), ("int8",), np.zeros(1), np.zeros(1))
    target = replace(target, factored=target.judged)
    middle = round(STEPS_PER_OCTAVE * math.log2(scale))
    octaves = _TRIED_OF_FEW if target.matrix.numel() <= _FEW else _TRIED
    tried = [middle + round(STEPS_PER_OCTAVE * octave) for octave in octaves]
    rows = sample_rows(target)
    rates, errors = try_steps(target, rows, tried, stats.judge)
    while rates[-1] > _SMALL_RATE and tried[-1] < middle + STEPS_PER_OCTAVE * (_TRIED[-1] + _MORE_TRIED):
        coarser = [tried[-1] + STEPS_PER_OCTAVE // 2, tried[-1] + STEPS_PER_OCTAVE]
        more_rates, more_errors = try_steps(target, rows, coarser, stats.judge)
        tried, rates, errors = tried + coarser, np.append(rates, more_rates), np.append(errors, more_errors)
    common = np.arange(middle + round(STEPS_PER_OCTAVE * _FINEST), tried[-1] + 1)
    parts = [_options(target, codes, common, tried, rates, errors) for codes in _KINDS]
    kinds = [codes for codes in _KINDS for _ in common]
    return RateCurve(
        np.concatenate([common, common]), tuple(kinds), *(np.concatenate(p) for p in zip(*parts, strict=True))
    )


def sample_rows(target: RoundingTarget) -> Tensor:
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


def try_steps(target: RoundingTarget, rows: Tensor, tried: list[int], moments: Tensor | None) -> tuple[Floats, Floats]:
    """Bits per weight, and squared error relative to that of fine steps, at each step, from the sampled rows.

    Rows are independent, so all steps are tried at once: as so many copies of the rows.
    """
    steps = torch.cat([target.steps(common, "int16")[rows] for common in tried])
    copies = rows.repeat(len(tried))
    if target.factored is not None:
        codes = round_with_feedback(target, copies, steps, CODE_LIMITS["int16"])
    else:
        codes = round_rows(target.matrix[copies], steps, CODE_LIMITS["int16"])
    error = _row_errors(target, copies, codes, steps, moments).reshape(len(tried), -1)
    plain = (steps.double().square() / 12).reshape(len(tried), -1)
    weight = target.importance[rows]
    errors = (weight * error).sum(1) / (weight * plain).sum(1).clamp(min=1e-300)
    narrow = codes.to(torch.int16).reshape(len(tried), len(rows), -1).numpy()
    return np.array([rate(one, len(target.matrix)) for one in narrow]), errors.numpy()


def _row_errors(target: RoundingTarget, rows: Tensor, codes: Tensor, steps: Tensor, moments: Tensor | None) -> Tensor:
    """The mean squared error of each row, weighted by the second moments of its inputs: float64 (rows,)."""
    error = target.matrix[rows] - codes * steps[:, None]
    if moments is None:
        return error.double().square().mean(1)
    layout, size = target.layout, len(target.matrix) // target.layout.groups
    if layout.groups > 1:
        chosen = (rows[::size] // size)[:, None] * layout.column_blocks + torch.arange(layout.column_blocks)
        moments = moments[chosen.reshape(-1)]
        layout = Blocks(len(rows) // size, layout.column_blocks)
    blocks = layout.blocks(error)
    energy = (torch.bmm(blocks, moments) * blocks).sum(2).double()
    trace = moments.diagonal(dim1=1, dim2=2).sum(1).double()[:, None].expand_as(energy)
    total, norm = (t.reshape(layout.groups, layout.column_blocks, -1).sum(1).reshape(-1) for t in (energy, trace))
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
    target: RoundingTarget, codes: CodeType, common: NDArray[np.int64], tried: list[int], rates: Floats, errors: Floats
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
