"""Products of a few rows with int8 weights, as in a step of decoding, where reading the weights takes all the time.

FBGEMM reads them at four fifths of the memory's bandwidth where oneDNN reaches half, and puts floats on a given grid
within the product, so that a single row needs no pass of its own for that.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from torch import Tensor

from pared.runtime.kernels.machine import exact_products, operator_of
from pared.switches import ignoring, quantized_engine

MOST_ROWS: Final = 64
"""The most for which it is used: for more, oneDNN is as fast, or faster where it has tiles."""

# oneDNN is 2 to 10 % faster for whole sequences of recurrent layers, but two threads must not call one of its packed
# weights at once: about one call in 5,000 then returned wrong numbers (torch 2.13).
_ENGINE: Final = "fbgemm"
_PRODUCT: Final = operator_of("quantized", "linear_with_input_q_dq_qweight_dq_output_fp32")


@functools.cache
def available() -> bool:
    """Whether there is such a product here, and it is right: found by trying."""
    if _PRODUCT is None or not exact_products():
        return False
    codes = torch.full((5, 66), 127, dtype=torch.int8, device="cpu")
    try:
        packed = packed_product(codes, torch.ones(5, device="cpu"))
        found = product(torch.full((2, 66), 255.0, device="cpu"), 1.0, 0, packed)
    except (AttributeError, NotImplementedError, RuntimeError):  # a build without FBGEMM, in the words of each version
        return False
    return bool((found == 255.0 * 127 * 66).all())


def packed_product(codes: Tensor, steps: Tensor, bias: Tensor | None = None) -> Any:
    """A weight in FBGEMM's own form; it can be neither copied nor pickled.

    PyTorch reads the engine from a global setting; the form remembers it.

    Args:
        codes: int8 of shape (out, in).
        steps: float32 of shape (out,).
        bias: float32 of shape (out,), or None.
    """
    weight = _as_quantized(codes, steps)
    with quantized_engine(_ENGINE):
        return torch.ops.quantized.linear_prepack(weight, bias)


def _as_quantized(codes: Tensor, steps: Tensor) -> Tensor:
    """Codes and steps as a quantized tensor, the only kind that these operators take.

    PyTorch plans to remove it: `available` will then say so, and other kernels will run.
    """
    zeros = torch.zeros(len(codes), dtype=torch.int64, device="cpu")
    with ignoring(UserWarning, "torch.quantize_per_tensor"):
        made: Tensor = torch._make_per_channel_quantized_tensor(codes.contiguous(), steps.double(), zeros, 0)
    return made


def product(x: Tensor, scale: float, zero_point: int, packed: Any) -> Tensor:
    """`scale * (codes - zero_point) @ (step * weight).T`, where the codes are those of `x` on a grid of 0..255.

    Args:
        x: contiguous float32 of shape (..., in), finite.
        scale: the distance of two points of the grid.
        zero_point: the code of 0.
        packed: from `packed_product`.

    Returns:
        float32 of shape (..., out).
    """
    found: Tensor = _PRODUCT(x, scale, zero_point, packed)
    return found
