"""What each int8 kernel computes, written plainly: dense products in float64, one operation after the other."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.formats.activation import NARROWEST, Outliers, Range, float32
from pared.runtime.kernels import outliers as columns
from pared.runtime.kernels.activation import ORIGIN
from pared.runtime.kernels.conv import Geometry
from pared.runtime.kernels.fbgemm.recurrent import Kind, Weights
from pared.runtime.kernels.machine import FULL_LEVELS
from pared.runtime.kernels.outliers import ExtraColumns
from pared.runtime.kernels.transposed import Moves

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def quantize(x: Tensor, scale: float, zero_point: int, levels: int) -> Tensor:
    """The codes of `activation.quantize`, bit for bit."""
    nearest = torch.round(x.double() * float32(1.0 / scale) + zero_point)
    return nearest.clamp(0, levels).nan_to_num(0.0).to(torch.uint8)


def quantize_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The codes, scales and zero points of `activation.quantize_rows`, bit for bit."""
    low = x.amin(-1, keepdim=True).clamp(max=-NARROWEST)
    high = x.amax(-1, keepdim=True).clamp(min=0.0)
    scale = (high - low) / (levels - 1)
    inverse = scale.reciprocal()
    zero_point = torch.round(-(low * inverse))
    nearest = torch.round((x * inverse).double() + zero_point)
    return nearest.nan_to_num(0.0).to(torch.uint8), scale, zero_point


def extra_codes(extra: ExtraColumns, x: Tensor) -> Tensor:
    """The codes of extra columns, bit for bit."""
    codes = x[..., extra.columns].double() * float32(1.0 / extra.scale) + (extra.zero_point - extra.shift.double())
    low, high = extra.low.double() - ORIGIN, extra.high.double() - ORIGIN
    return torch.clamp(torch.round(codes), low, high).nan_to_num(extra.zero_point).to(torch.uint8)


def linear(
    x: Tensor,
    codes: Tensor,
    step: Tensor,
    bias: Tensor | None = None,
    *,
    span: Range | None = None,
    outliers: Outliers = (),
    levels: int = FULL_LEVELS,
) -> Tensor:
    """The output of `linear.static` with a span, of `linear.dynamic` without."""
    if span is None:
        row_codes, row_scale, row_zero_point = quantize_rows(x.float(), levels)
        centred, scale = row_codes.double() - row_zero_point, row_scale.double() * step
    else:
        size, zero_point = span.grid(levels)
        found = quantize(x.float(), size, zero_point, levels)
        if outliers:
            extra = columns.extra_columns(outliers, span, levels)
            found = torch.cat([found, extra_codes(extra, x.float())], -1)
            codes = torch.cat([codes, codes[:, extra.columns]], 1)
        centred, scale = found.double() - zero_point, size * step.double()
    out = F.linear(centred, codes.double()) * scale
    return (out if bias is None else out + bias).to(x.dtype)


def convolution(
    x: Tensor,
    codes: Tensor,
    step: Tensor,
    geometry: Geometry,
    bias: Tensor | None = None,
    *,
    span: Range | None = None,
    levels: int = FULL_LEVELS,
) -> Tensor:
    """The output of `conv.static` with a span, of `conv.dynamic` without."""
    scale: float | Tensor
    if span is None and x.numel():
        samples = x.float() if x.dim() == codes.dim() else x.float()[None]
        rows, scale, zero_points = quantize_rows(samples.flatten(1), levels)
        centred = (rows.double() - zero_points).reshape(x.shape)
        scale = scale.double().reshape(-1, *[1] * (x.dim() - 1)) if x.dim() == codes.dim() else scale.double()
    else:
        scale, zero_point = (span or Range(0.0, 0.0)).grid(levels)
        centred = quantize(x.float(), scale, zero_point, levels).double() - zero_point
    trailing = [zeros for more in reversed(geometry.trailing) for zeros in (0, more)]
    moves = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    out = CONVOLUTIONS[codes.dim() - 2](F.pad(centred, trailing), codes.double(), None, *moves)
    channel = (-1, *(1 for _ in codes.shape[2:]))
    out = out * scale * step.double().reshape(channel)
    return (out if bias is None else out + bias.reshape(channel)).to(x.dtype)


def transposed_convolution(
    x: Tensor, codes: Tensor, step: Tensor, bias: Tensor | None, moves: Moves, span: Range | None, levels: int
) -> Tensor:
    """The output of `transposed.run` for inputs with a batch, in float64."""
    rows = x.movedim(1, -1).float()
    if span is None:
        quantized, scale, zero_point = quantize_rows(rows, levels)
        values = (quantized.double() - zero_point) * scale
    else:
        size, zero = span.grid(levels)
        values = (quantize(rows, size, zero, levels).double() - zero) * size
    weight = codes.double() * step.double().reshape(1, -1, *[1] * (codes.dim() - 2))
    convolve = F.conv_transpose1d if codes.dim() == 3 else F.conv_transpose2d
    geometry = (moves.stride, moves.padding, moves.output_padding, 1, moves.dilation)
    out: Tensor = convolve(values.movedim(-1, 1), weight, None if bias is None else bias.double(), *geometry)
    return out


def sequence(kind: Kind, x: Tensor, state: Sequence[Tensor], weights: Weights, *, first: bool) -> tuple[Tensor, ...]:
    """The output of `recurrent.run` for one direction of one layer, in float64.

    Args:
        kind: of layer.
        x: floats (steps, batch, inputs).
        state: one or two of (batch, hidden).
        weights: plain ones.
        first: whether the input is not that of a layer below.

    Returns:
        the outputs (steps, batch, hidden), and the last state or states. Gates stand in the order that PyTorch
        documents for its layers (Hochreiter and Schmidhuber 1997; Cho et al. 2014).
    """
    inputs = _gates(x, weights, 0, in_floats=first)
    now = [one.double() for one in state]
    outputs = []
    for step in inputs:
        hidden = _gates(now[0], weights, 1)
        if kind == "lstm":
            i, f, g, o = (step + hidden).chunk(4, 1)
            cell = f.sigmoid() * now[1] + i.sigmoid() * g.tanh()
            now = [o.sigmoid() * cell.tanh(), cell]
        else:
            (r, z, n), (hr, hz, hn) = step.chunk(3, 1), hidden.chunk(3, 1)
            update = (z + hz).sigmoid()
            now = [(1 - update) * (n + (r + hr).sigmoid() * hn).tanh() + update * now[0]]
        outputs.append(now[0])
    return torch.stack(outputs), *now


def _gates(x: Tensor, weights: Weights, which: int, *, in_floats: bool = False) -> Tensor:
    scale, zero_point = Range(-1.0, 1.0).grid(weights.levels)
    weight = weights.codes[which] * weights.steps[which].reshape(-1, 1)
    if in_floats:
        out = F.linear(x.double(), weight.half().double())
    else:
        centred = quantize(x.float(), scale, zero_point, weights.levels).double() - zero_point
        out = F.linear(centred * scale, weight.double())
    bias = weights.biases[which]
    return out if bias is None else out + bias.double()
