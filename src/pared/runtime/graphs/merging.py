"""Merge products of one input, and let products add to a tensor in place."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from pared.runtime.graphs.draft import Draft, given_to, only_user
from pared.runtime.graphs.products import QLINEAR, quantize_contiguous, quantize_contiguous_all
from pared.runtime.kernels import linear
from pared.runtime.kernels.machine import PLAIN, operator_of
from pared.runtime.layers.counterpart import Counterpart

_ATEN: Final = torch.ops.aten
_ADDING: Final = operator_of("onednn", "qlinear_pointwise", "binary")


def product_and_sum(
    codes: Tensor,
    scale: float,
    zero_point: int,
    weight: Any,
    step: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    other: Tensor,
    how: str,
) -> Tensor:
    """A product of codes plus a tensor of its shape; "sum" writes to that tensor's memory, "add" to new memory."""
    if codes.shape[:-1] != other.shape[:-1]:  # the kernel does not check
        raise RuntimeError(f"{tuple(codes.shape)} codes are added to {tuple(other.shape)}")
    given = (codes, scale, zero_point, weight, step, zeros, other.contiguous(), bias)
    found: Tensor = _ADDING(*given, *PLAIN[:3], 1.0, 0, how, 1.0, *PLAIN[3:])
    return found


# Operators whose output is contiguous memory of its own, and those whose output shares no memory with their input.
_GIVERS: Final = (QLINEAR, product_and_sum, _ATEN.layer_norm.default)
_READERS: Final = (quantize_contiguous, quantize_contiguous_all, linear.rows_of, _ATEN.layer_norm.default)


def merge(draft: Draft) -> None:
    """Merge linear layers of one input, such as those of an attention, into one that gives all of their outputs.

    A call of the kernel costs a tenth as much as its arithmetic, or a third if there are few rows.
    """
    found: dict[object, list[fx.Node]] = defaultdict(list)
    for node in draft.calls(QLINEAR):
        if tuple(given_to(node)[-len(PLAIN) :]) == PLAIN and "linear" in node.meta:
            found[given_to(node)[:3]].append(node)
    for node in draft.calls(linear.product_of_rows, linear.static):
        x, _, _, *grid = given_to(node)
        if "linear" in node.meta:
            grids = (draft.held(one) if draft.holds(one) else one for one in grid)
            found[(node.target, x, *grids)].append(node)
    for nodes in found.values():
        if len(nodes) > 1:
            _merge(draft, nodes)


def _merge(draft: Draft, nodes: list[fx.Node]) -> None:
    layers: list[tuple[Counterpart, str]] = [node.meta["linear"] for node in nodes]
    codes = [owner.pared_codes(attribute) for owner, attribute in layers]
    steps = [owner.pared_row_steps(attribute) for owner, attribute in layers]
    activation = layers[0][0].pared_activation
    assert activation is not None, "it runs on codes"
    # The first layer keeps the merged weight, for other graphs of the same model.
    key = ("merged", *((id(owner), attribute) for owner, attribute in layers))
    packed: linear.PackedLinear = layers[0][0].pared_packed(
        key, lambda: linear.joined(codes, torch.cat(steps), activation.outliers)
    )
    first = nodes[0]
    is_kernel = first.target is QLINEAR
    biases = [draft.held(given_to(node)[6 if is_kernel else 2]) for node in nodes]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([s.new_zeros(len(s)) if b is None else b for b, s in zip(biases, steps, strict=True)])
    if is_kernel:
        weight = (packed.weight, packed.step, packed.zeros, bias)
        whole = draft.before(first, QLINEAR, *given_to(first)[:3], *weight, *PLAIN)
    else:
        assert callable(first.target), "a function of ours"
        whole = draft.before(first, first.target, given_to(first)[0], packed, bias, *given_to(first)[3:])
    parts = draft.before(first, _ATEN.split_with_sizes.default, whole, [len(rows) for rows in codes], -1)
    outputs = [draft.before(first, operator.getitem, parts, i) for i in range(len(nodes))]
    for node, output in zip(nodes, outputs, strict=True):
        draft.replace(node, output)


def take_sums(draft: Draft) -> None:
    """Let a product whose output is only added to a tensor do the addition.

    If nothing else needs the tensor any more, the result takes its memory: new memory is slow.
    """
    places = {node: place for place, node in enumerate(draft.graph.nodes)}
    for node in draft.calls(_ATEN.add.Tensor):
        for product, other in (given_to(node), given_to(node)[::-1]):
            if node.kwargs or product is other or not _is_free(product, node):
                continue
            if not _alike(node, product) or not _alike(node, other):
                continue
            how = "sum" if _is_spent(other, node, places) else "add"
            given = given_to(product)[: -len(PLAIN)]
            draft.replace(node, draft.before(node, product_and_sum, *given, other, how))
            draft.graph.erase_node(product)
            break


def _is_free(node: Any, user: fx.Node) -> bool:
    """Whether a node is a product without activation that only one node uses."""
    if not isinstance(node, fx.Node) or node.target is not QLINEAR or only_user(node) is not user:
        return False
    return given_to(node)[-len(PLAIN) :] == PLAIN


def _is_spent(node: fx.Node, user: fx.Node, places: Mapping[fx.Node, int]) -> bool:
    """Whether a user of a node may overwrite its memory: all other users have read it and share none of it."""
    others = [other for other in node.users if other is not user]
    read = all(other.target in _READERS and places[other] < places[user] for other in others)
    return node.target in _GIVERS and read


def _alike(one: fx.Node, other: Any) -> bool:
    """Whether two nodes give tensors of the same shape and type."""
    a, b = (x.meta.get("val") if isinstance(x, fx.Node) else None for x in (one, other))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype != b.dtype or a.dim() != b.dim():
        return False
    # Sizes that are unknown count as different.
    return all(statically_known_true(i == j) for i, j in zip(a.shape, b.shape, strict=True))
