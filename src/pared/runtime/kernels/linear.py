"""A linear layer on int8 weights: `y = x @ (step * codes).T + bias`, with the activations as unsigned codes.

`static` puts the whole input on one calibrated grid. `dynamic` gives each row (token) a grid of its own, from the row's
lowest and highest value: several times more accurate where tokens differ in magnitude, and no row's result depends on
the others in the batch, at the price of a few more passes over the activations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.errors import ModelError
from pared.formats.activation import NARROWEST, Outliers, Range
from pared.runtime.kernels.activation import check, codes_of, quantize, quantize_rows
from pared.runtime.kernels.fbgemm import rows as few
from pared.runtime.kernels.machine import FULL_LEVELS, PLAIN, has_tiles, levels_for
from pared.runtime.kernels.outliers import ExtraColumns, columns_of, extra_columns, widened

# How many codes of a row one instruction multiplies, with tiles and without.
_TILE: Final = 64
_WORD: Final = 4


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A weight as the kernels want it, in the order of each at first use. It can be neither copied nor pickled.

    Args:
        codes: gives them, int8 of shape (out, width).
        step: float32, one per output.
        zeros: int32, the weight's zero points, all 0.
        sums: float32, the sum of each output's weights.
        inputs: the number of columns, without extra ones.
        used: the number of columns with extra ones.
        width: the number of columns with extra ones and padding.
        levels: the largest activation code at which products are exact.
    """

    codes: Callable[[], Tensor]
    step: Tensor
    zeros: Tensor
    sums: Tensor
    inputs: int
    used: int
    width: int
    levels: int

    @functools.cached_property
    def weight(self) -> Tensor:
        """In the order of oneDNN."""
        made: Tensor = torch.ops.onednn.qlinear_prepack.default(self.codes().contiguous(), None)
        return made

    @functools.cached_property
    def for_few_rows(self) -> Any:
        """In the form of FBGEMM."""
        return few.packed_product(self.codes()[:, : self.used], self.step)


def pack(codes: Tensor, step: Tensor, outliers: Outliers = ()) -> PackedLinear:
    """Pack a weight for `static` and `dynamic`.

    Args:
        codes: int8 of shape (out, in), within -127..127.
        step: float32 of shape (out,); zero makes a row of zeros.
        outliers: the columns that leave a static input's range.

    Raises:
        ModelError: a shape or a type is not as above, or an outlier is not one of the columns.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ModelError(
            f"a linear layer's codes must be int8 in two dimensions, not {codes.dtype} in {codes.dim()}",
            remedy="Pass the codes of a grid of int8 codes, one row per output.",
        )
    check_step(step, codes.shape[0])
    if not all(0 <= column < codes.shape[1] for column in columns_of(outliers)):
        raise ModelError(
            f"an outlier lies outside the {codes.shape[1]} columns of the weight",
            remedy="Quantize the model again: this weight has another shape than the one that was calibrated.",
        )
    whole = _in_order(codes, outliers)
    return PackedLinear(
        codes=functools.partial(_in_order, codes, outliers),
        step=step.detach().contiguous(),
        zeros=torch.zeros(len(codes), dtype=torch.int32, device="cpu"),
        sums=(codes.sum(1).double() * step.detach()).float(),
        inputs=codes.shape[1],
        used=codes.shape[1] + len(columns_of(outliers)),
        width=whole.shape[1],
        levels=levels_for(whole),
    )


def joined(codes: Sequence[Tensor], step: Tensor, outliers: Outliers = ()) -> PackedLinear:
    """Pack weights of one input as one weight, which is made where it is needed and not kept."""
    made = pack(torch.cat([*codes]), step, outliers)
    return replace(made, codes=lambda: _in_order(torch.cat([*codes]), outliers))


def _in_order(codes: Tensor, outliers: Outliers) -> Tensor:
    return padded(widened(codes, outliers)) if outliers else codes


def static(x: Tensor, packed: PackedLinear, bias: Tensor | None, span: Range, outliers: Outliers = ()) -> Tensor:
    """The layer's output for inputs that were calibrated to lie in `span`.

    Args:
        x: float32, bfloat16 or float16 of shape (..., in). Values outside the span are clipped to it, outliers to the
            spans of their extra columns.
        packed: the weight, from `pack`.
        bias: floats of shape (out,), or None.
        span: the range of the inputs seen in calibration.
        outliers: the columns that leave it, as given to `pack`.

    Returns:
        the output of shape (..., out), in the type of `x`.

    Raises:
        ModelError: the last dimension is not as wide as the weight.
        NotFiniteError: the input holds NaN or Inf.
    """
    # The operator takes any leading shape; with a few rows, each reshape would cost a tenth of the product.
    floats = _floats(x, packed)
    if not floats.numel():
        return _without_input(x, packed, bias)
    scale, zero_point = span.grid(packed.levels)
    grid = (scale, zero_point, packed.levels)
    more = extra_columns(outliers, span, packed.levels) if outliers else None
    if packed.levels == FULL_LEVELS and floats.numel() <= few.MOST_ROWS * packed.inputs and few.available():
        out = _product_of_few(floats, scale, zero_point, packed, more, float_bias(bias))
    else:
        codes = quantize(floats, *grid) if more is None else quantize_all(floats, *grid, more, packed.width)
        out = _product(codes, scale, zero_point, packed, float_bias(bias))
    return out if x.dtype is torch.float32 and x.dim() > 1 else out.view(*x.shape[:-1], out.shape[-1]).to(x.dtype)


def _product_of_few(
    x: Tensor, scale: float, zero_point: int, packed: PackedLinear, more: ExtraColumns | None, bias: Tensor | None
) -> Tensor:
    """The product of `static`, which puts its input on the grid itself."""
    check(x, scale * max(zero_point, packed.levels - zero_point) * (1 if more is None else more.reach))
    whole = x if more is None else torch.cat([x, more.values(x)], -1)
    out = few.product(whole, scale, zero_point, packed.for_few_rows)
    return out if bias is None else out.add_(bias)


def padded(codes: Tensor) -> Tensor:
    """A weight padded with columns of zeros to a width at which the kernel is fast.

    On tiles, 396 columns of 1024 rows take a fifth longer than 448: the kernel copies what does not fill a tile.
    """
    return F.pad(codes, (0, -codes.shape[1] % (_TILE if has_tiles() else _WORD)))


def quantize_all(x: Tensor, scale: float, zero_point: int, levels: int, more: ExtraColumns, width: int) -> Tensor:
    """The codes of an input (float32, (..., in)) with those of its extra columns, (..., width).

    Codes of padding are multiplied by zeros, so they may be anything.
    """
    whole = torch.empty((*x.shape[:-1], width), dtype=torch.uint8, device="cpu")
    inputs = x.shape[-1]
    check(x, scale * max(zero_point, levels - zero_point) * more.reach)
    codes_of(x, scale, zero_point, levels, whole[..., :inputs])
    more.codes(x, whole[..., inputs : inputs + len(more.columns)])
    return whole


def dynamic(x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
    """The layer's output, with each row of the input on a grid of its own.

    As in `static`, but nothing is clipped, and a row that holds NaN or Inf gives only NaN or Inf.
    """
    floats = _floats(x, packed)
    if not floats.numel():
        return _without_input(x, packed, bias)
    return product_of_rows(rows_of(floats, packed.levels), packed, bias).to(x.dtype).view(*x.shape[:-1], -1)


class Rows(NamedTuple):
    """An input with each row on a grid of its own; several products may share it.

    Args:
        codes: uint8 of shape (rows, in), or float32 where the rows are few.
        scale, zero_point: float32 of shape (rows, 1).
        leading: the shape of the input without its last dimension.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    leading: tuple[int, ...]


class OneRow(NamedTuple):
    """An input of one row, which the product itself puts on the row's grid.

    Args:
        values: float32 of shape (..., in).
        scale: that of the row.
        zero_point: that of the row.
    """

    values: Tensor
    scale: float
    zero_point: int


def rows_of(x: Tensor, levels: int) -> Rows | OneRow:
    """The rows of an input (float32, (..., in), not empty), as `dynamic` quantizes them."""
    count = x.numel() // x.shape[-1]
    if count > few.MOST_ROWS or not few.available():
        return Rows(*quantize_rows(x.reshape(-1, x.shape[-1]), levels), tuple(x.shape[:-1]))
    if count == 1:
        low, high = (end.item() for end in x.aminmax())
        scale = (max(high, 0.0) - min(low, -NARROWEST)) / (levels - 1)  # the grid of `quantize_rows`
        if math.isfinite(scale):
            return OneRow(x.contiguous(), scale, round(-min(low, -NARROWEST) / scale))
    codes, scales, zero_points = quantize_rows(x.reshape(-1, x.shape[-1]), levels)
    return Rows(codes.float(), scales, zero_points, tuple(x.shape[:-1]))


def product_of_rows(rows: Rows | OneRow, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """The product of `dynamic`, in float32 of shape (..., out)."""
    bias = float_bias(bias)
    if isinstance(rows, OneRow):
        out = few.product(*rows, packed.for_few_rows)
        return out if bias is None else out.add_(bias)
    if rows.codes.dtype is torch.float32:
        out = few.product(rows.codes, 1.0, 0, packed.for_few_rows)
    else:
        out = _product(rows.codes, 1.0, 0, packed, None)
    # The kernel knows one zero point for all rows, so each row's own is subtracted here; new memory would be slow.
    out.addcmul_(rows.zero_point, packed.sums, value=-1.0)
    out = out.mul_(rows.scale) if bias is None else torch.addcmul(bias, out, rows.scale, out=out)
    return out.view(*rows.leading, out.shape[-1])


def check_step(step: Tensor, rows: int) -> None:
    """Raise a ModelError if there is not one step per row: the kernels would read beyond their end."""
    if step.dtype != torch.float32 or step.shape != (rows,):
        raise ModelError(
            f"{rows} rows of codes need {rows} float32 steps, not {step.dtype} {tuple(step.shape)}",
            remedy="Pass one step per output.",
        )


def float_bias(bias: Tensor | None) -> Tensor | None:
    """The bias as the kernels take it: float32, without gradients."""
    if bias is None or (bias.dtype is torch.float32 and not bias.requires_grad):
        return bias
    return bias.detach().float()


def _floats(x: Tensor, packed: PackedLinear) -> Tensor:
    """The input in contiguous float32, with at least two dimensions."""
    if x.dim() == 0 or x.shape[-1] != packed.inputs:
        raise ModelError(
            f"the layer takes (..., {packed.inputs}), but was given {tuple(x.shape)}",
            remedy="Check the shape of the input.",
        )
    floats = x.detach() if x.requires_grad else x
    floats = floats if x.dtype is torch.float32 else floats.float()
    return floats.contiguous() if x.dim() > 1 else floats.reshape(1, -1)


def _product(codes: Tensor, scale: float, zero_point: int, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """`scale * (codes - zero_point) @ (step * weight).T + bias` in float32."""
    weight = (packed.weight, packed.step, packed.zeros, bias)
    out: Tensor = torch.ops.onednn.qlinear_pointwise.default(codes, scale, zero_point, *weight, *PLAIN)
    return out


def _without_input(x: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """The output for an input without rows or columns, for which the kernel would divide by zero: the bias."""
    out = x.new_zeros(*x.shape[:-1], len(packed.step))
    return out if bias is None else out + bias.detach().to(x.dtype)
