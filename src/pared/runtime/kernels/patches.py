"""Convolutions as products of patches: every patch of the input is a row.

oneDNN's int8 convolutions work on blocks of input channels, and waste most of a block where there are one to three. Of
filters of a single tap the patches are the pixels, as they lie in channels-last memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from torch import Tensor

from pared.runtime.kernels.machine import has_tiles

_FEW: Final = 3  # channels
# Measured on AVX512-VNNI: 512 taps in one channel take 3.9 ms so and 130 ms as a convolution, 16 x 16 in three channels
# 0.7 and 1.0 ms, but 3 x 3 in three 1.8 and 0.4 ms, since each number is copied into nine patches for little work.
_LEAST_TAPS: Final = 64


def pays(shape: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether a filter of codes is better multiplied with patches.

    >>> pays((1024, 1, 512, 1), (1, 1), (1, 1), 1), pays((32, 3, 3, 3), (1, 1), (1, 1), 1)
    (True, False)
    """
    taps = math.prod(shape[2:])
    if groups > 1 or any(one > 1 for one in dilation):
        return False
    if taps == 1:
        # As fast as a convolution, but on tiles one of 8 x 7 x 7 pixels from 1152 to 192 channels takes 90 us in place
        # of 6 ms; without them, on AVX2, it may take several times as long.
        return all(one == 1 for one in stride) and has_tiles()
    return shape[1] <= _FEW and taps >= _LEAST_TAPS


def rows_of_filter(codes: Tensor) -> Tensor:
    """A filter of shape (out, in, taps...) as (out, taps * in), in the order of `patches_of`."""
    return codes.movedim(1, -1).flatten(1).contiguous()


def patches_of(codes: Tensor, taps: Sequence[int], stride: Sequence[int]) -> Tensor:
    """All patches that a filter meets.

    Args:
        codes: of shape (batch, in, space...), padded.
        taps: the filter's size in each dimension of space.
        stride: its steps.

    Returns:
        shape (batch, places..., taps * in).

    >>> import torch
    >>> patches_of(torch.arange(4).reshape(1, 1, 4), (2,), (1,)).tolist()
    [[[0, 1], [1, 2], [2, 3]]]
    """
    x = codes.movedim(1, -1).contiguous()
    if all(one == 1 for one in (*taps, *stride)):
        return x
    for i, (size, step) in enumerate(zip(taps, stride, strict=True)):
        x = x.unfold(i + 1, size, step)
    return x.movedim(len(taps) + 1, -1).flatten(len(taps) + 1)


def channels_first(out: Tensor) -> Tensor:
    """Products of patches, of shape (batch, places..., out), as (batch, out, places...): a view, channels last."""
    return out.movedim(-1, 1)
