"""Convolutions as products of patches: every patch of the input is a row of a matrix.

oneDNN's int8 convolutions work on blocks of input channels, and waste most of a block if there are only one to three.
For a filter of a single tap the patches are the pixels, as they lie in channels-last memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from torch import Tensor

from pared.runtime.kernels.machine import has_tiles

_FEW_CHANNELS: Final = 3
# Measured on AVX512-VNNI: 512 taps in one channel take 3.9 ms as patches and 130 ms as a convolution, 16 x 16 in three
# channels 0.7 and 1.0 ms, but 3 x 3 in three 1.8 and 0.4 ms: each value is copied to nine patches for little work.
_LEAST_TAPS: Final = 64


def pays(shape: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether a filter of this shape is faster when it is multiplied with patches.

    >>> pays((1024, 1, 512, 1), (1, 1), (1, 1), 1), pays((32, 3, 3, 3), (1, 1), (1, 1), 1)
    (True, False)
    """
    taps = math.prod(shape[2:])
    if groups > 1 or any(distance > 1 for distance in dilation):
        return False
    if taps == 1:
        # On tiles, 8 x 7 x 7 pixels from 1152 to 192 channels take 90 us instead of 6 ms as a convolution; other shapes
        # take as long as before. Without tiles, on AVX2, patches may take several times as long.
        return all(step == 1 for step in stride) and has_tiles()
    return shape[1] <= _FEW_CHANNELS and taps >= _LEAST_TAPS


def rows_of_filter(codes: Tensor) -> Tensor:
    """A filter of shape (out, in, taps...) as (out, taps * in), in the order of `patches_of`."""
    return codes.movedim(1, -1).flatten(1).contiguous()


def patches_of(codes: Tensor, taps: Sequence[int], stride: Sequence[int]) -> Tensor:
    """All patches of the input that a filter is multiplied with.

    Args:
        codes: shape (batch, in, space...), padded.
        taps: the filter's size in each spatial dimension.
        stride: its steps.

    Returns:
        the patches, of shape (batch, places..., taps * in).

    >>> import torch
    >>> patches_of(torch.arange(4).reshape(1, 1, 4), (2,), (1,)).tolist()
    [[[0, 1], [1, 2], [2, 3]]]
    """
    x = codes.movedim(1, -1).contiguous()
    if all(size == 1 for size in (*taps, *stride)):
        return x
    for i, (size, step) in enumerate(zip(taps, stride, strict=True)):
        x = x.unfold(i + 1, size, step)
    return x.movedim(len(taps) + 1, -1).flatten(len(taps) + 1)


def channels_first(out: Tensor) -> Tensor:
    """Products of patches, of shape (batch, places..., out), as (batch, out, places...): a view, channels last."""
    return out.movedim(-1, 1)
