"""Convolutions in one, two and three dimensions on int8 weights, with the activations as unsigned codes.

`static` puts the input on one calibrated grid, `dynamic` each sample on a grid of its own range, so that no sample's
result depends on the others in its batch. Padding is with zeros; for another mode, pad the float input first.

The kernels work on channels-last memory. The output has the layout that PyTorch's own convolution would give: channels
last if the input or the weight is, else contiguous, which costs a copy. So a model in channels-last layout is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.errors import ModelError
from pared.formats.activation import Range
from pared.runtime.kernels.activation import quantize, quantize_rows
from pared.runtime.kernels.linear import check_step, float_bias
from pared.runtime.kernels.machine import PLAIN, levels_for
from pared.runtime.kernels.patches import channels_first, patches_of, pays, rows_of_filter

_FLOAT_CONVOLUTIONS: Final = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SPACE: Final = ("depth", "height", "width")
_CHANNELS_LAST: Final = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass(frozen=True)
class Geometry:
    """How a filter moves, with one number per spatial dimension.

    Args:
        stride: the step of the filter.
        padding: the number of zeros before and after each dimension.
        dilation: the distance between taps.
        groups: the number of independent convolutions into which the channels are split.
        trailing: 1 for each dimension that gets one more zero at its end, for uneven "same" padding.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    trailing: tuple[int, ...]

    @classmethod
    def of(
        cls,
        taps: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Geometry:
        """The geometry that `F.conv1d`, `2d` and `3d` are called with.

        Args:
            taps: the filter's size in each spatial dimension.
            stride: one number for all dimensions, or one each.
            padding: likewise, or "valid" (none), or "same" (the output is as large as the input).
            dilation: likewise.
            groups: the number of independent convolutions.

        Raises:
            ModelError: a sequence does not have one number per dimension.

        >>> Geometry.of((3, 4), padding="same")
        Geometry(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, trailing=(0, 1))
        """
        dimensions = len(taps)
        spread = _each(dilation, dimensions)
        trailing = (0,) * dimensions
        if padding == "same":
            missing = [step * (size - 1) for step, size in zip(spread, taps, strict=True)]
            padding, trailing = [zeros // 2 for zeros in missing], tuple(zeros % 2 for zeros in missing)
        elif isinstance(padding, str):
            padding = 0
        return cls(_each(stride, dimensions), _each(padding, dimensions), spread, groups, trailing)

    @property
    def sides(self) -> tuple[int, ...]:
        """The number of zeros before and after each spatial dimension, the last one first, as `F.pad` wants them.

        >>> Geometry.of((3, 4), padding="same").sides
        (1, 2, 1, 1)
        """
        ends = zip(reversed(self.padding), reversed(self.trailing), strict=True)
        return tuple(zeros for before, more in ends for zeros in (before, before + more))


@dataclass(frozen=True, eq=False)
class PackedConv:
    """A filter as the kernel wants it. It can be neither copied nor pickled.

    Args:
        weight: in the kernel's own order.
        step: float32, one per output channel.
        zeros: int32, the weight's zero points, all 0.
        sums: float32, the sum of each output channel's weights.
        geometry: how the filter moves.
        channels: the number of input channels.
        channels_last: whether the plain codes were in channels-last memory.
        levels: the largest activation code at which products are exact.
        taps: the filter's size if it is multiplied with patches (`kernels.patches`), else empty.
    """

    weight: Tensor
    step: Tensor
    zeros: Tensor
    sums: Tensor
    geometry: Geometry
    channels: int
    channels_last: bool
    levels: int
    taps: tuple[int, ...] = ()


def pack(codes: Tensor, step: Tensor, geometry: Geometry) -> PackedConv:
    """Pack a filter for `static` and `dynamic`.

    Args:
        codes: int8 of shape (out, in / groups, taps...), within -127..127.
        step: float32 of shape (out,); zero makes a channel of zeros.
        geometry: how the filter moves.

    Raises:
        ModelError: a shape or a type is not as above.
    """
    dimensions = codes.dim() - 2
    if codes.dtype != torch.int8 or dimensions not in _FLOAT_CONVOLUTIONS:
        raise ModelError(
            f"a convolution's codes must be int8 in three to five dimensions, not {codes.dtype} in {codes.dim()}",
            remedy="Pass the codes of a grid of int8 codes, one row per output channel.",
        )
    if len(geometry.stride) != dimensions:
        raise ModelError(
            f"a filter with {dimensions} spatial dimensions cannot move by {geometry}",
            remedy="Make the geometry from the filter's own taps.",
        )
    check_step(step, codes.shape[0])
    step = step.detach().contiguous()
    by_patches = pays(codes.shape, geometry.stride, geometry.dilation, geometry.groups)
    if by_patches:
        weight = torch.ops.onednn.qlinear_prepack.default(rows_of_filter(codes), None)
    else:
        moves = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        weight = torch.ops.onednn.qconv_prepack.default(codes.contiguous(), step, 1.0, 0, *moves, None)
    return PackedConv(
        weight=weight,
        step=step,
        zeros=torch.zeros(len(step), dtype=torch.int32, device="cpu"),
        sums=(codes.flatten(1).sum(1).double() * step).float(),
        geometry=geometry,
        channels=codes.shape[1] * geometry.groups,
        channels_last=_is_channels_last(codes),
        levels=levels_for(codes),
        taps=tuple(codes.shape[2:]) if by_patches else (),
    )


def static(x: Tensor, packed: PackedConv, bias: Tensor | None, span: Range) -> Tensor:
    """The layer's output for inputs that were calibrated to lie in `span`.

    Args:
        x: float32, bfloat16 or float16 of shape (batch, in, space...) or (in, space...). Values outside the span are
            clipped to it.
        packed: the filter, from `pack`.
        bias: floats of shape (out,), or None.
        span: the range of the inputs seen in calibration.

    Returns:
        the output in the shape and layout of the float convolution's, and in the type of `x`.

    Raises:
        ModelError: the number of dimensions or channels does not fit the filter.
        NotFiniteError: the input holds NaN or Inf.
    """
    batch = _batch(x, packed)
    scale, zero_point = span.grid(packed.levels)
    codes = quantize(batch, scale, zero_point, packed.levels)
    return _convolved(x, batch, packed, codes, scale, zero_point, bias)


def dynamic(x: Tensor, packed: PackedConv, bias: Tensor | None = None) -> Tensor:
    """The layer's output, with each sample of the input on a grid of its own.

    As in `static`, but nothing is clipped, and a sample that holds NaN or Inf gives only NaN or Inf.
    """
    batch = _batch(x, packed)
    if not batch.numel():
        return _convolved(x, batch, packed, batch.to(torch.uint8), 1.0, 0, bias)
    # In the order of memory: PyTorch would copy a channels-last tensor to find its extremes.
    is_last = _is_channels_last(batch)
    samples = batch.movedim(1, -1) if is_last else batch
    rows, scales, zero_points = quantize_rows(samples.flatten(1), packed.levels)
    codes = rows.view(samples.shape)
    codes = codes.movedim(-1, 1) if is_last else codes
    if len(batch) == 1 and scales.isfinite():
        return _convolved(x, batch, packed, codes, float(scales), int(zero_points), bias)
    return _convolved(x, batch, packed, codes, scales, zero_points, bias)


def _batch(x: Tensor, packed: PackedConv) -> Tensor:
    """The input with a batch dimension, in float32."""
    dimensions = len(packed.geometry.stride)
    missing = dimensions + 2 - x.dim()
    if missing not in (0, 1) or x.shape[1 - missing] != packed.channels:
        raise ModelError(
            f"the layer takes (batch, {packed.channels}, {', '.join(_SPACE[-dimensions:])}), "
            f"but was given {tuple(x.shape)}",
            remedy="Check the shape of the input.",
        )
    return (x.unsqueeze(0) if missing else x).detach().float()


def _convolved(
    x: Tensor,
    batch: Tensor,
    packed: PackedConv,
    codes: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The convolution of `batch`, in the type and with the dimensions of `x`.

    Args:
        x: the layer's input.
        batch: the same with a batch dimension, in float32.
        packed: the filter.
        codes: those of `batch`.
        scale: that of all samples, or float32 of shape (batch, 1).
        zero_point: likewise.
        bias: floats of shape (out,), or None.
    """
    bias = float_bias(bias)
    if isinstance(scale, Tensor):
        products = _products(_padded(codes, packed, zero_point), packed, 1.0, None)
        shift = packed.sums * (scale * zero_point).neg_()
        shift = shift if bias is None else shift.add_(bias)
        each = [1] * (products.dim() - 2)
        out = torch.addcmul(shift.reshape(*shift.shape, *each), products, scale.reshape(-1, 1, *each), out=products)
    else:
        if zero_point:
            # The kernel is not told of the zero point: it would rearrange the whole weight at every call.
            shift = packed.sums * (-scale * zero_point)
            bias = shift if bias is None else shift.add_(bias)
        out = _products(_padded(codes, packed, zero_point), packed, scale, bias)
    if not (packed.channels_last or _is_channels_last(batch)):
        out = out.contiguous()
    return (out.squeeze(0) if x.dim() < batch.dim() else out).to(x.dtype)


def _padded(codes: Tensor, packed: PackedConv, zero_point: int | Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The codes, padded if the kernel cannot do that, and the padding that is left to the kernel."""
    moves = packed.geometry
    none = (0,) * len(moves.padding)
    if isinstance(zero_point, Tensor) and any(moves.sides) and bool(zero_point.any()):
        return _pad_samples(codes, moves.sides, zero_point), none
    value = 0 if isinstance(zero_point, Tensor) else zero_point
    if value or any(moves.trailing) or packed.taps:
        return pad_codes(codes, moves.sides, value), none
    return codes, moves.padding


def _pad_samples(codes: Tensor, sides: Sequence[int], zero_points: Tensor) -> Tensor:
    """The codes, each sample padded with its own code of zero, in the kernel's own layout."""
    space = codes.dim() - 2
    before, behind = sides[0::2][::-1], sides[1::2][::-1]
    sizes = [size + b + e for size, b, e in zip(codes.shape[2:], before, behind, strict=True)]
    layout = _CHANNELS_LAST.get(space, torch.contiguous_format)
    whole = torch.empty((*codes.shape[:2], *sizes), dtype=torch.uint8, device="cpu", memory_format=layout)
    # Samples that hold NaN have none; whatever is computed from their codes becomes NaN.
    whole.copy_(zero_points.nan_to_num(0.0).to(torch.uint8).reshape(-1, *[1] * (space + 1)))
    inside = (slice(start, start + size) for start, size in zip(before, codes.shape[2:], strict=True))
    whole[(slice(None), slice(None), *inside)] = codes
    return whole


def _products(given: tuple[Tensor, tuple[int, ...]], packed: PackedConv, scale: float, bias: Tensor | None) -> Tensor:
    """The products with codes and the padding that is left, of shape (batch, out, space...), in float32."""
    codes, padding = given
    moves, weight = packed.geometry, (packed.weight, packed.step, packed.zeros, bias)
    if packed.taps:
        rows = patches_of(codes, packed.taps, moves.stride)
        if not rows.numel():
            return codes.new_zeros(len(codes), len(packed.step), *rows.shape[1:-1], dtype=torch.float32)
        return channels_first(torch.ops.onednn.qlinear_pointwise.default(rows, scale, 0, *weight, *PLAIN))
    moved = (moves.stride, padding, moves.dilation, moves.groups)
    kernel = getattr(torch.ops.onednn, f"qconv{len(padding)}d_pointwise").default
    out: Tensor = kernel(codes, scale, 0, *weight, *moved, *PLAIN)
    # An empty batch in one dimension of space comes back in the kernel's own two.
    return out.squeeze(2) if out.dim() > codes.dim() else out


def pad_codes(codes: Tensor, sides: Sequence[int], zero_point: int) -> Tensor:
    """The codes padded with the code of zero, in the kernel's own layout.

    Args:
        codes: uint8 of shape (batch, in, space...).
        sides: how many to add before and after each spatial dimension, the last one first.
        zero_point: the code of zero.
    """
    if layout := _CHANNELS_LAST.get(codes.dim() - 2):
        codes = codes.contiguous(memory_format=layout)
    return F.pad(codes, sides, value=zero_point) if any(sides) else codes


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether the memory is in channels-last order and not contiguous at the same time."""
    layout = _CHANNELS_LAST.get(tensor.dim() - 2)
    return layout is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout)


def _each(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """One number per dimension."""
    numbers = (value,) * dimensions if isinstance(value, int) else tuple(value)
    if len(numbers) != dimensions:
        raise ModelError(
            f"a filter with {dimensions} spatial dimensions was given {len(numbers)} numbers: {numbers}",
            remedy="Give one number for all dimensions, or one for each.",
        )
    return numbers
