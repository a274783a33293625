"""Rotations of pairs of numbers by a token's place (Su et al., 2021, arXiv:2104.09864), in halves, as one function."""

from __future__ import annotations

import sys
from typing import Any, Final

import torch
from torch import Tensor, fx

from pared.runtime.graphs.draft import Draft, given_to, is_call, type_of

_ATEN: Final = torch.ops.aten


def signed(sine: Tensor) -> Tensor:
    """The sines with the sign of the first half changed.

    >>> signed(torch.tensor([1.0, 2.0])).tolist()
    [-1.0, 2.0]
    """
    first, second = sine.chunk(2, -1)
    return torch.cat([-first, second], -1)


def rotated(x: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
    """`x * cosine + cat(-second half of x, first half of x) * sine`, of sines with signs.

    >>> rotated(torch.tensor([[1.0, 2.0]]), torch.zeros(2), signed(torch.ones(2))).tolist()
    [[-2.0, 1.0]]
    """
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), signed_sine)


def join(draft: Draft) -> None:
    """Compute rotations by `rotated`."""
    for node in draft.calls(_ATEN.add.Tensor):
        for plain, turned in (given_to(node)[:2], given_to(node)[1::-1]):
            found = None if node.kwargs else _parts(plain, turned)
            if found is not None:
                x, cosine, sine = found
                draft.replace(node, draft.before(node, rotated, x, cosine, draft.before(node, signed, sine)))
                break


def _parts(plain: Any, turned: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """An input, the cosines and the sines, if these are the two terms of its rotation."""
    for halves, sine in _factors(turned):
        x = _turned(halves)
        for own, cosine in _factors(plain) if x is not None else ():
            if own is x and isinstance(cosine, fx.Node) and isinstance(sine, fx.Node) and _same_width(x, cosine, sine):
                return x, cosine, sine
    return None


def _factors(node: Any) -> tuple[tuple[Any, Any], ...]:
    if not is_call(node, _ATEN.mul.Tensor) or node.kwargs:
        return ()
    one, other = given_to(node)
    return (one, other), (other, one)


def _turned(node: Any) -> Any:
    """The input whose second half with the sign changed, and first half, this is."""
    if not is_call(node, _ATEN.cat.default) or len(given_to(node)) != 2 or len(given_to(node)[0]) != 2:
        return None
    (minus, first), dim = given_to(node)
    if not is_call(minus, _ATEN.neg.default) or not is_call(first, _ATEN.slice.Tensor):
        return None
    second = given_to(minus)[0]
    x = given_to(first)[0]
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if not is_call(second, _ATEN.slice.Tensor) or not isinstance(value, Tensor) or type_of(x) is not torch.float32:
        return None
    width, last = value.shape[-1], value.dim() - 1
    if not isinstance(width, int) or width % 2 or dim not in (-1, last):
        return None
    wanted = ((x, last, 0, width // 2), (x, last, width // 2, sys.maxsize))
    return x if (given_to(first), given_to(second)) == wanted else None


def _same_width(x: fx.Node, *others: fx.Node) -> bool:
    """Whether all have the last dimension of the input, none is broadcast along it, and they are of its type."""
    values = [one.meta.get("val") for one in others]
    width = x.meta["val"].shape[-1]
    return all(isinstance(v, Tensor) and v.dtype is torch.float32 and v.shape[-1] == width for v in values)
