"""The fastest form of attention: masks converted to floats once, and bfloat16 on machines with tiles."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, fx

from pared.runtime.graphs.draft import Draft, given_to, type_of
from pared.runtime.graphs.products import QLINEAR
from pared.runtime.kernels.machine import PLAIN

_ATEN: Final = torch.ops.aten
_ATTENTION: Final = _ATEN.scaled_dot_product_attention.default
# Operators that only move or select values.
_MOVES: Final = (
    operator.getitem,
    _ATEN.split_with_sizes.default,
    _ATEN.reshape.default,
    _ATEN.transpose.int,
    _ATEN.permute.default,
    _ATEN.unflatten.int,
    _ATEN.flatten.using_ints,
    _ATEN.contiguous.default,
)


def as_floats(mask: Tensor) -> Tensor:
    """A mask of booleans as the floats that attention adds to its scores."""
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_fill_(mask.logical_not(), -torch.inf)


def share_masks(draft: Draft) -> None:
    """Convert a mask of booleans to floats once, not in every layer."""
    known: dict[fx.Node, fx.Node] = {}
    for node in draft.calls(_ATTENTION):
        query, *_, mask = (*given_to(node), None)[:4]
        if type_of(mask) is torch.bool and type_of(query) is torch.float32:
            if mask not in known:
                known[mask] = draft.before(node, as_floats, mask)
            node.args = (*given_to(node)[:3], known[mask], *given_to(node)[4:])


def to_bfloat16(x: Tensor) -> Tensor:
    """The same numbers, rounded."""
    return x.to(torch.bfloat16)


def mask_to_bfloat16(mask: Tensor) -> Tensor:
    """A mask of floats in bfloat16; a finite value below the range of bfloat16 stays finite."""
    least = torch.finfo(torch.bfloat16).min
    return torch.where(mask == -torch.inf, mask, mask.clamp(min=least)).to(torch.bfloat16)


def to_float32(x: Tensor) -> Tensor:
    """The same numbers."""
    return x.to(torch.float32)


def run_in_bfloat16(draft: Draft) -> None:
    """Let attention take and give bfloat16; products that only attention reads give bfloat16 as well."""
    known: dict[fx.Node, fx.Node] = {}
    for node in draft.calls(_ATTENTION):
        query, key, value, *rest = given_to(node)
        if any(type_of(x) is not torch.float32 for x in (query, key, value)):
            continue
        mask = rest[0] if rest else None
        given = [draft.before(node, to_bfloat16, x) for x in (query, key, value)]
        if isinstance(mask, fx.Node) and (mask.target is as_floats or type_of(mask) is torch.float32):
            if mask not in known:
                rounded = to_bfloat16 if mask.target is as_floats else mask_to_bfloat16
                known[mask] = draft.before(node, rounded, mask)
            rest = [known[mask], *rest[1:]]
        attended = draft.before(node, _ATTENTION, *given, *rest, **node.kwargs)
        draft.replace(node, draft.before(node, to_float32, attended))
    for node in draft.calls(QLINEAR):
        _give_bfloat16(draft, node)


def _give_bfloat16(draft: Draft, node: fx.Node) -> None:
    """Let a product give bfloat16 if its output is only read in bfloat16."""
    if given_to(node)[-len(PLAIN) + 2] is not torch.float32:
        return
    ends = list(_readers(node))
    if ends and all(end.target is to_bfloat16 for end in ends):
        place = len(given_to(node)) - len(PLAIN) + 2
        node.args = (*given_to(node)[:place], torch.bfloat16, *given_to(node)[place + 1 :])
        for end in ends:
            end.replace_all_uses_with(given_to(end)[0])
            draft.graph.erase_node(end)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that compute with the values of a node, also after they were moved."""
    for user in node.users:
        if user.op == "call_function" and user.target in _MOVES:
            yield from _readers(user)
        else:
            yield user
