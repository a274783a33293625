"""A scale for each column of a weight: which ones, and where they save bits at equal damage.

A column whose input counts for more gets finer steps: `value = step[row] * scale[column] * code`. With scales c,
rounding W means rounding `W / c` to steps by rows where the second moments of the inputs are `c M c`. So what is known
of a weight is scaled, and what rounds and judges it stays as it is. Without error feedback the optimum at fine steps
would be `M_jj^(-1/2)`; feedback moves errors to other columns, so that a smaller power is better. Sources: AWQ (Lin et
al. 2023, arXiv 2306.00978) scales columns before rounding; WaterSIC (arXiv 2603.04956) has steps by columns behind
feedback.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from pared.fitting.calibration.sensitivity import TensorStats
from pared.fitting.rounding.curves import sample_blocks
from pared.fitting.rounding.feedback import factor
from pared.fitting.rounding.importance import bits_at_equal_damage, plain_target
from pared.fitting.rounding.targets import narrowed, of_blocks
from pared.formats.coded import log_step
from pared.formats.streams import encode_steps
from pared.formats.views import View

# Powers of the mean square of a column's input that are tried, see above.
POWERS: Final = (-0.25, -0.5)
# Share of the mean of all columns that is added to each one's, so that inputs which calibration hardly saw still count.
_DAMPING: Final = 0.01
_REACH: Final = (
    2  # octaves from their geometric mean that scales may lie: codes of fine columns would leave their range
)
_PER_OCTAVE: Final = 4  # scales: more would take more bytes than they save
# Bits per weight that scales have to save: the layer then multiplies every input, and its product joins fewer others.
_LEAST_GAIN: Final = 0.02
_ENTRY: Final = 16  # bytes of the index for one more part (an estimate)


def chosen_scales(matrix: Tensor, view: View, stats: TensorStats) -> Tensor | None:
    """The scales that save most bits at equal damage, as calls judge it that they do not come from.

    Args:
        matrix: float32 (rows, columns): the weight through its view.
        view: which dimensions are rows.
        stats: what errors of the weight cost.

    Returns:
        float32 (columns,); None where equal scales are best, or nearly so.
    """
    tried = [scale for scale in (column_scales(stats, power, matrix.shape[1]) for power in POWERS) if scale is not None]
    if not tried or not bool(matrix.any()):
        return None
    fewest, best = _bits(matrix, view, stats, None) - _LEAST_GAIN, None
    for scale in tried:
        bits = _bits(matrix, view, stats, scale) + 8 * nbytes_of(scale) / matrix.numel()
        if bits < fewest:
            fewest, best = bits, scale
    return best


def column_scales(stats: TensorStats, power: float, columns: int) -> Tensor | None:
    """Scales by a power of the mean squares of the columns' inputs.

    Args:
        stats: what is known of the weight.
        power: below 0.
        columns: how many the weight has.

    Returns:
        float32 (columns,), each 2^(k / 4) for a whole k; None where nothing is known of the inputs, where groups of
        rows have inputs of their own, or where all scales would be equal.

    >>> import torch
    >>> moments = torch.diag(torch.tensor([4.0, 4.0, 64.0, 64.0]))[None]
    >>> column_scales(TensorStats(torch.ones(1), moments), -0.25, 4).tolist()
    [1.4142135381698608, 1.4142135381698608, 0.7071067690849304, 0.7071067690849304]
    """
    moments = stats.moments if stats.inputs is None else stats.inputs
    if moments is None or stats.layout.groups > 1:
        return None
    squares = moments.diagonal(dim1=1, dim2=2).reshape(-1)[:columns].double()
    mean = float(squares.mean())
    if not mean > 0:
        return None
    octaves = power * (squares + _DAMPING * mean).log2()
    whole = ((octaves - octaves.mean()).clamp(-_REACH, _REACH) * _PER_OCTAVE).round()
    if not bool((whole != whole[0]).any()):
        return None
    # A little below the intended scale of the table, so that rounding up finds it.
    return log_step(torch.exp2(whole / _PER_OCTAVE).mul_(1 - 1e-6).float())


def scaled_stats(stats: TensorStats, scale: Tensor) -> TensorStats:
    """What is known of a weight whose columns are divided by these scales, float32 (columns,)."""
    judge = stats.judge
    assert stats.moments is not None
    assert judge is not None
    blocks, width, _ = stats.moments.shape
    padded = torch.ones(blocks * width).index_copy_(0, torch.arange(len(scale)), scale).reshape(blocks, width)

    def around(moments: Tensor | None) -> Tensor | None:
        return None if moments is None else padded[:, :, None] * moments * padded[:, None, :]

    squares = judge.diagonal(dim1=1, dim2=2).double()
    more = float((squares * padded.double().square()).sum() / squares.sum().clamp(min=torch.finfo(torch.float64).tiny))
    return replace(
        stats,
        rows=stats.rows * more,
        moments=around(stats.moments),
        unseen=around(stats.unseen),
        inputs=around(stats.inputs),
    )


def nbytes_of(scale: Tensor | None) -> int:
    """The bytes that the scales of a weight take in a file, those of the index included; 0 for None."""
    return 0 if scale is None else len(encode_steps(scale.numpy()).payload) + _ENTRY


def _bits(matrix: Tensor, view: View, stats: TensorStats, scale: Tensor | None) -> float:
    """Bits per weight at equal damage, see `bits_at_equal_damage`, with one damping for all."""
    known = stats if scale is None else scaled_stats(stats, scale)
    assert known.moments is not None
    assert known.judge is not None
    seen = known.moments if known.unseen is None else known.moments - known.unseen
    target = plain_target(matrix, view, known, scale=scale)
    blocks = sample_blocks(target, stats.judge)
    seen, judge = (of_blocks(target.layout, moments, blocks) for moments in (seen, known.judge))
    return bits_at_equal_damage(replace(narrowed(target, blocks), factored=factor(seen)), judge)
