"""Products of bfloat16 inputs with int8 weights: the weights are codes, the inputs are not rounded any further."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.formats.coded import Coded

# Up to this many rows PyTorch's kernel for such weights is faster than to make them bfloat16 first, which takes as long
# for any number of rows (docs/decisions/052-small-memory.md).
MOST_ROWS: Final = 12
_VECTOR: Final = 32  # it loads columns by whole vectors, and so reads beyond rows of other sizes


def takes(x: object, weight: Coded) -> bool:
    """Whether the kernel takes an input, and a weight: bfloat16, and int8 with a step for each row."""
    return type(x) is Tensor and x.dtype == torch.bfloat16 and weight.parts["codes"].dtype == torch.int8


def product(x: Tensor, weight: Coded, bias: Tensor | None) -> Tensor:
    """`F.linear(x, weight.decode(), bias)`, without decoding the weight: its codes are exact in bfloat16.

    Args:
        x: bfloat16, of shape (..., columns).
        weight: on a grid of int8, of shape (rows, columns).
        bias: what is added, of shape (rows,); None: nothing.

    Returns:
        bfloat16, of shape (..., rows): sums of float32, rounded to bfloat16, times the steps.
    """
    codes, step, scale = (weight.parts.get(name) for name in ("codes", "step", "scale"))
    assert codes is not None, "a grid has codes"
    assert step is not None, "a grid has steps"
    if scale is not None:  # a column's scale is its input's as well
        x = (x * scale).bfloat16()
    rows = x.reshape(-1, x.shape[-1])
    if 0 < len(rows) <= MOST_ROWS and rows.shape[1] % _VECTOR == 0 and hasattr(torch, "_weight_int8pack_mm"):
        # Its own steps are bfloat16, which would move all outputs of a row one way.
        ones = torch.ones((), dtype=torch.bfloat16).expand(len(codes)).contiguous()
        sums: Tensor = torch._weight_int8pack_mm(rows.contiguous(), codes, ones)
    else:
        sums = F.linear(rows, codes.bfloat16())
    out = sums * step.reshape(-1)
    if bias is not None:
        out += bias
    return out.bfloat16().reshape(*x.shape[:-1], len(codes))
