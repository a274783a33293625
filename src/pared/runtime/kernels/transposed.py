"""Transposed convolutions in one and two dimensions on int8 weights: a linear product, and a sum where taps overlap.

Each input position gives a patch of `taps` outputs; the patches of all positions are one int8 product, and folding adds
them up in floats. So a dynamic input has a grid per position, as in `linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pared.formats.activation import Range
from pared.runtime.kernels.linear import PackedLinear, dynamic, float_bias, static
from pared.runtime.kernels.linear import pack as pack_rows


@dataclass(frozen=True)
class Moves:
    """Where patches lie, with one number per spatial dimension; see `F.conv_transpose2d`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls,
        dimensions: int,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Moves:
        """The moves that `F.conv_transpose1d` and `2d` are called with."""
        assert groups == 1, "there is no kernel for groups"

        def each(value: int | Sequence[int]) -> tuple[int, ...]:
            found = (value,) * dimensions if isinstance(value, int) else tuple(value)
            return found * dimensions if len(found) < dimensions else found

        return cls(each(stride), each(padding), each(output_padding), each(dilation))

    def size(self, inputs: Sequence[int], taps: Sequence[int]) -> list[int]:
        """The output's size in each spatial dimension."""
        return [
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1
            for n, s, p, o, d, k in zip(
                inputs, self.stride, self.padding, self.output_padding, self.dilation, taps, strict=True
            )
        ]


def pack(codes: Tensor, step: Tensor) -> PackedLinear:
    """Pack a weight for `run`.

    Args:
        codes: int8 of shape (in, out, taps...), within -127..127.
        step: float32 of shape (out,).
    """
    inputs, outputs = codes.shape[:2]
    rows = codes.permute(1, *range(2, codes.dim()), 0).reshape(-1, inputs)
    return pack_rows(rows.contiguous(), step.repeat_interleave(len(rows) // max(1, outputs)))


def run(
    x: Tensor, packed: PackedLinear, bias: Tensor | None, taps: Sequence[int], moves: Moves, span: Range | None
) -> Tensor:
    """The layer's output.

    Args:
        x: floats of shape (batch, in, space...) or (in, space...).
        packed: the weight, from `pack`.
        bias: floats of shape (out,), or None.
        taps: the filter's size in its one or two spatial dimensions.
        moves: where patches lie.
        span: the calibrated range of `x`; None gives each position a grid of its own.
    """
    dimensions = len(taps)
    batched = x if x.dim() == dimensions + 2 else x[None]
    space = list(batched.shape[2:])
    rows = batched.flatten(2).transpose(1, 2).float()
    patches = dynamic(rows, packed) if span is None else static(rows, packed, None, span)
    size = moves.size(space, taps)

    def plane(numbers: Sequence[int], missing: int) -> tuple[int, ...]:
        """Numbers for one dimension as those of a plane of height one."""
        return (missing,) * (2 - dimensions) + tuple(numbers)

    geometry = (plane(taps, 1), plane(moves.dilation, 1), plane(moves.padding, 0), plane(moves.stride, 1))
    out = F.fold(patches.transpose(1, 2), plane(size, 1), *geometry)
    out = out.reshape(*out.shape[:2], *size)
    floats = float_bias(bias)
    if floats is not None:
        out = out.add_(floats.reshape(-1, *[1] * dimensions))
    return (out if x.dim() == dimensions + 2 else out[0]).to(x.dtype)
