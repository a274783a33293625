"""Inputs, codes and steps for the int8 kernels, and how near to its reference an output must be."""

import pytest
import torch
from torch import Tensor

from pared.formats.activation import Range
from pared.runtime.kernels.machine import available

needs_kernels = pytest.mark.skipif(available() != "", reason=available() or "the int8 kernels run here")

# Sums are exact on both sides, so only the rounding of a few float32 operations may differ.
TOLERANCE = 2e-6

SPAN = Range(-2.0, 3.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_codes(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def random_step(rows: int) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(2)) / 50 + 1e-3


def assert_same(fast: Tensor, slow: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal to within a share of the largest output: unlike a cosine, this sees a wrong scale."""
    assert fast.shape == slow.shape
    assert fast.dtype == slow.dtype
    if slow.numel():
        assert float((fast - slow).abs().max()) <= tolerance * float(slow.abs().max())
