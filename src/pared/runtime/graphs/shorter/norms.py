"""The norm by the root mean square (Zhang and Sennrich, 2019, arXiv:1910.07467) as one function."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pared.runtime.graphs.draft import Draft, given_to, is_call, rank_of, type_of

_ATEN: Final = torch.ops.aten


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` along the last dimension.

    >>> rms_norm(torch.tensor([[3.0, -4.0]]), torch.tensor([1.0, 2.0]), 0.0) * 12.5**0.5
    tensor([[ 3., -8.]])
    """
    if x.numel() != weight.numel():
        return F.rms_norm(x, weight.shape, weight, eps)
    flat = x.reshape(-1)  # a single row: half of the time
    mean = float(torch.dot(flat, flat)) / len(flat) + eps
    return torch.mul(x, weight).mul_(mean**-0.5 if mean else math.inf)


def join(draft: Draft) -> None:
    """Compute norms of floats by `rms_norm`."""
    for node in draft.calls(_ATEN.mul.Tensor):
        for weight, scaled in (given_to(node)[:2], given_to(node)[1::-1]):
            found = None if node.kwargs or rank_of(weight) != 1 else _input_of(scaled)
            if found is None or type_of(weight) is not torch.float32 or rank_of(found[0]) < 2:
                continue
            x, eps = found
            if x.meta["val"].shape[-1] == weight.meta["val"].shape[0]:
                draft.replace(node, draft.before(node, rms_norm, x, weight, eps))
                break


def _input_of(scaled: Any) -> tuple[fx.Node, float] | None:
    """The input of a norm and what keeps it from dividing by zero, if this is `x * rsqrt(mean(x^2) + eps)`."""
    if not is_call(scaled, _ATEN.mul.Tensor):
        return None
    for x, root in (given_to(scaled)[:2], given_to(scaled)[1::-1]):
        if not is_call(root, _ATEN.rsqrt.default) or type_of(x) is not torch.float32:
            continue
        total = given_to(root)[0]
        if not is_call(total, _ATEN.add.Tensor) or total.kwargs or not isinstance(given_to(total)[1], float):
            continue
        mean, eps = given_to(total)
        if not is_call(mean, _ATEN.mean.dim) or mean.kwargs or list(given_to(mean)[1:]) != [[-1], True]:
            continue
        square = given_to(mean)[0]
        if is_call(square, _ATEN.pow.Tensor_Scalar) and given_to(square) == (x, 2):
            return x, eps
    return None
