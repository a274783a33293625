"""A linear layer on int8 weights: `y = x @ (step * codes).T + bias`, with the activations as unsigned codes.

`static` puts the whole input on one calibrated grid. `dynamic` gives each row (token) a grid of its own,
from the row's lowest and highest value: several times more accurate where tokens differ in size, and the
result of a row does not depend on its neighbours in the batch, at the price of a few more passes over the
activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.errors import ModelError
from pared.formats.activation import Outliers, Range
from pared.runtime.kernels.activation import quantize, quantize_rows
from pared.runtime.kernels.machine import has_tiles, levels_for
from pared.runtime.kernels.outliers import ExtraColumns, columns_of, extra_columns, widened

# The codes of a row that an instruction multiplies at once, with tiles and without.
_TILE: Final = 64
_WORD: Final = 4


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A weight as the kernel wants it. It can be neither copied nor pickled.

    Args:
        weight: opaque to everything but the kernel.
        step: float32, one per output.
        zeros: the weight's zero points, all 0.
        sums: of each output's weights, float32.
        inputs: the weight's width, without extra columns.
        width: the codes of a row that it takes, extra columns and what fills them up included.
        levels: the largest activation code that it allows.
    """

    weight: Tensor
    step: Tensor
    zeros: Tensor
    sums: Tensor
    inputs: int
    width: int
    levels: int


def pack(codes: Tensor, step: Tensor, outliers: Outliers = ()) -> PackedLinear:
    """A weight for `static` and `dynamic`.

    Args:
        codes: int8 of shape (out, in), within -127..127.
        step: float32 of shape (out,); zero makes a row of zeros.
        outliers: of a static input.

    Raises:
        ModelError: a shape or a type is not as said, or an outlier is no column.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ModelError(
            f"a linear layer's codes are int8 in two dimensions, not {codes.dtype} in {codes.dim()}",
            remedy="Pass the codes of a grid of int8 codes, one row per output.",
        )
    check_step(step, codes.shape[0])
    if not all(0 <= column < codes.shape[1] for column in columns_of(outliers)):
        raise ModelError(
            f"an outlier's column is not one of {codes.shape[1]}",
            remedy="Quantize the model anew: its weight has another shape than the one that was calibrated.",
        )
    whole = filled_up(widened(codes, outliers)) if outliers else codes
    return PackedLinear(
        weight=torch.ops.onednn.qlinear_prepack.default(whole.contiguous(), None),
        step=step.detach().contiguous(),
        zeros=torch.zeros(len(codes), dtype=torch.int32, device="cpu"),
        sums=(codes.sum(1).double() * step.detach()).float(),
        inputs=codes.shape[1],
        width=whole.shape[1],
        levels=levels_for(whole),
    )


def static(x: Tensor, packed: PackedLinear, bias: Tensor | None, span: Range, outliers: Outliers = ()) -> Tensor:
    """The layer's output for inputs that were calibrated to lie in `span`.

    Args:
        x: float32, bfloat16 or float16 of shape (..., in). Values outside the span are clipped to it, those of
            outliers as many spans further out, and NaN reads as its low end.
        packed: from `pack`.
        bias: floats of shape (out,), or None.
        span: the range of the inputs seen in calibration.
        outliers: columns that leave it, as packed.

    Returns:
        The type of `x`, of shape (..., out).

    Raises:
        ModelError: the last dimension is not as wide as the weight.
    """
    # The operator takes any leading shape: at a few rows each reshape would cost as much as a tenth of the product.
    floats = _floats(x, packed)
    if not floats.numel():
        return _without_input(x, packed, bias)
    scale, zero_point = span.grid(packed.levels)
    grid = (scale, zero_point, packed.levels)
    if outliers:
        codes = quantize_all(floats, *grid, extra_columns(outliers, span, packed.levels), packed.width)
    else:
        codes = quantize(floats, *grid)
    out = _product(codes, scale, zero_point, packed, float_bias(bias))
    return out if x.dtype is torch.float32 and x.dim() > 1 else _like(x, out)


def filled_up(codes: Tensor) -> Tensor:
    """A weight with columns of zeros behind, up to a width at which the kernel is fast.

    At 396 columns of 1024 rows it takes a fifth longer than at 448, on tiles: it copies what does not fill one.
    """
    return F.pad(codes, (0, -codes.shape[1] % (_TILE if has_tiles() else _WORD)))


def quantize_all(x: Tensor, scale: float, zero_point: int, levels: int, more: ExtraColumns, width: int) -> Tensor:
    """The codes of all columns of float32 of shape (..., in).

    Those that fill them up meet zeros, so they may be anything.
    """
    whole = torch.empty((*x.shape[:-1], width), dtype=torch.uint8, device="cpu")
    inputs = x.shape[-1]
    quantize(x, scale, zero_point, levels, whole[..., :inputs])
    more.codes(x, whole[..., inputs : inputs + len(more.columns)])
    return whole


def dynamic(x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
    """The layer's output, each row of the input on a grid of its own.

    As `static`, but nothing is clipped, and a row that holds NaN or Inf gives only NaN or Inf.
    """
    floats = _floats(x, packed)
    if not floats.numel():
        return _without_input(x, packed, bias)
    return product_of_rows(rows_of(floats, packed.levels), packed, bias).to(x.dtype).view(*x.shape[:-1], -1)


class Rows(NamedTuple):
    """An input, each row on a grid of its own: several products may share it.

    Args:
        codes: uint8 of shape (rows, in).
        scale, zero_point: float32 of shape (rows, 1).
        leading: the shape of the input without its last dimension.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    leading: tuple[int, ...]


def rows_of(x: Tensor, levels: int) -> Rows:
    """What `dynamic` makes of its input: float32 of shape (..., in), of one number at least."""
    return Rows(*quantize_rows(x.reshape(-1, x.shape[-1]), levels), tuple(x.shape[:-1]))


def product_of_rows(rows: Rows, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """What `dynamic` computes, in float32 of shape (..., out)."""
    out = _product(rows.codes, 1.0, 0, packed, None)
    # The kernel knows one zero point for all rows: each row's own comes off here. In place: new memory is
    # slow.
    out.addcmul_(rows.zero_point, packed.sums, value=-1.0)
    bias = float_bias(bias)
    out = out.mul_(rows.scale) if bias is None else torch.addcmul(bias, out, rows.scale, out=out)
    return out.view(*rows.leading, out.shape[-1])


def check_step(step: Tensor, rows: int) -> None:
    """Refuse steps that are not one per row: the kernels would read beyond their end."""
    if step.dtype != torch.float32 or step.shape != (rows,):
        raise ModelError(
            f"{rows} rows of codes need {rows} float32 steps, not {step.dtype} {tuple(step.shape)}",
            remedy="Pass one step per output.",
        )


def float_bias(bias: Tensor | None) -> Tensor | None:
    """The bias as the kernels take it."""
    if bias is None or (bias.dtype is torch.float32 and not bias.requires_grad):
        return bias
    return bias.detach().float()


def _floats(x: Tensor, packed: PackedLinear) -> Tensor:
    """The input in contiguous float32, at least one row."""
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
    out: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        codes,
        scale,
        zero_point,
        packed.weight,
        packed.step,
        packed.zeros,
        bias,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return out


def _like(x: Tensor, out: Tensor) -> Tensor:
    """The output rows in the leading shape and the type of the input."""
    return out.view(*x.shape[:-1], out.shape[-1]).to(x.dtype)


def _without_input(x: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """What is left where there are no rows, or nothing in them: the bias. The kernel would divide by zero."""
    out = x.new_zeros(*x.shape[:-1], len(packed.step))
    return out if bias is None else out + bias.detach().to(x.dtype)
