"""Attention of a single token whose queries share keys: the keys are not repeated for each of them."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pared.runtime.graphs.attention import as_floats
from pared.runtime.graphs.draft import Draft, given_to, is_call, type_of

_ATEN: Final = torch.ops.aten
_ATTENTION: Final = _ATEN.scaled_dot_product_attention.default


def of_one_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention (batch, heads, 1, features) of queries to keys of fewer heads, each for as many neighbouring queries.

    To a kernel these are queries of one head, at several places.

    Args:
        query: (batch, heads, 1, features).
        key: (batch, fewer heads, places, features).
        value: as key.
        mask: floats or booleans that broadcast to (batch, 1, 1, places), or None.
        scale: a factor of the products; default: 1 / sqrt(features).
    """
    batch, heads, one, features = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], features)
    found = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return found.reshape(batch, heads, one, -1)


def join(draft: Draft) -> None:
    """Let attention of a single token read keys and values as they are in the cache."""
    for node in draft.calls(_ATTENTION):
        query, key, value, *rest = given_to(node)
        mask, *more = (*rest, None)[: max(1, len(rest))]
        shapes = [_shape(one) for one in (query, mask)]
        if shapes[0] is None or not _is(shapes[0][2], 1) or len(shapes[0]) != 4:
            continue
        if mask is not None and (shapes[1] is None or len(shapes[1]) != 4 or not _is(shapes[1][1], 1)):
            continue
        if any(more) or node.kwargs.keys() - {"scale"}:
            continue
        found = [_repeated(one) for one in (key, value)]
        if found[0] is None or found[1] is None or found[0][1] != found[1][1]:
            continue
        if type_of(mask) is torch.bool:
            mask = draft.before(node, as_floats, mask)
        joined = draft.before(node, of_one_token, query, found[0][0], found[1][0], mask, **node.kwargs)
        draft.replace(node, joined)


def _shape(node: Any) -> Any:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.shape if isinstance(value, Tensor) else None


def _is(size: object, wanted: int) -> bool:
    return isinstance(size, int) and size == wanted


def _repeated(node: Any) -> tuple[fx.Node, int] | None:
    """What was repeated for each of a number of neighbouring heads, and that number."""
    if not is_call(node, _ATEN.reshape.default):
        return None
    widened: Any = given_to(node)[0]
    narrow: Any = given_to(widened)[0] if is_call(widened, _ATEN.expand.default) else None
    if not is_call(narrow, _ATEN.unsqueeze.default) or given_to(narrow)[1] != 2:
        return None
    x: Any = given_to(narrow)[0]
    before, between, after = (_shape(one) for one in (x, widened, node))
    if before is None or between is None or after is None or (len(before), len(between), len(after)) != (4, 5, 4):
        return None
    heads, groups = before[1], between[2]
    if not isinstance(heads, int) or not isinstance(groups, int) or not _is(after[1], heads * groups):
        return None
    return (x, groups) if _is(between[1], heads) and _is(after[3], before[3]) else None
