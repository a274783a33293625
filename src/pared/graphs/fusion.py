"""Neighbours of int8 products join them: normalization and activation, and the next product's quantization.

Each rule looks at one operator and what it is applied to, and leaves the graph as it is where anything is unusual.
"""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch import Tensor, fx

from pared.graphs.draft import Draft, only_user, rank_of
from pared.graphs.products import QCONVS, QLINEAR, quantize_rows_of_memory
from pared.kernels import conv
from pared.kernels.activation import quantize
from pared.kernels.conv import pad_codes
from pared.kernels.machine import FULL_LEVELS
from pared.layers.dispatch import packed_filter

_ATEN: Final = torch.ops.aten
_KERNELS: Final = (QLINEAR, *QCONVS)
# The last six arguments of every kernel: scale, zero point and type of the output, and what is applied before.
_AFTER: Final = 6
_PLAIN: Final = (1.0, 0, torch.float32, "none", [], "")

_ORDINARY: Final = (_ATEN.batch_norm.default, _ATEN._native_batch_norm_legit_no_training.default)


def simplify(draft: Draft) -> None:
    """Drop what does nothing in inference, and let operators take any layout of memory."""
    for node in draft.calls(_ATEN.dropout.default, _ATEN.dropout_.default, _ATEN.feature_dropout.default):
        if not node.args[2]:
            _skip(draft, node)
    for node in draft.calls(_ATEN.clone.default):
        if not node.kwargs:  # nothing writes to tensors here, so a copy is as good as the original
            _skip(draft, node)
    for node in draft.calls(_ATEN._assert_tensor_metadata.default):
        draft.graph.erase_node(node)  # the types of inputs are what graphs are chosen by
    for node in draft.calls(_ATEN.view.default, _ATEN._unsafe_view.default):
        node.target = _ATEN.reshape.default  # products may give another layout than float ones did


def _skip(draft: Draft, node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # a node
    draft.graph.erase_node(node)


def fuse(draft: Draft) -> None:
    """All rules, in the order in which one makes room for the next."""
    for node in draft.calls(*_ORDINARY):
        _fold_norm(draft, node)
    for node in draft.calls(*_ACTIVATIONS):
        _take_in(draft, node)
    for node in draft.calls(quantize):
        _lift(draft, node)
    for node in draft.calls(quantize, quantize_rows_of_memory):
        _give_codes(draft, node)


def _plain_kernel(node: Any) -> bool:
    """Whether a node is an int8 kernel that gives plain floats."""
    return isinstance(node, fx.Node) and node.target in _KERNELS and tuple(node.args[-_AFTER:]) == _PLAIN


def _fold_norm(draft: Draft, node: fx.Node) -> None:
    """`norm(step * sums + bias)` is `(step * gain) * sums + (bias * gain + shift)`; where a gain is negative, the codes
    change their sign instead of the step.
    """
    x, weight, bias, mean, variance, *rest = node.args
    out, epsilon = node, rest[1]
    if node.target is _ORDINARY[0]:
        if rest[0]:  # training
            return
        epsilon = rest[2]
    else:
        first = only_user(node)
        if first is None or first.target is not operator.getitem or first.args[1] != 0:
            return
        out = first
    if not _plain_kernel(x) or only_user(x) is not node or x.target is QLINEAR or mean is None or variance is None:
        return
    known = [draft.held(one) for one in (weight, bias, mean, variance)]
    gain = (known[3].double() + epsilon).rsqrt()
    gain = gain if known[0] is None else gain * known[0].double()
    shift = -known[2].double() * gain
    shift = shift if known[1] is None else shift + known[1].double()
    packed, step, total = _scaled(draft, x, gain)
    made = draft.before(x, x.target, *x.args[:3], packed, step, x.args[5], (total * gain + shift).float(), *x.args[7:])
    made.meta = {**x.meta, "val": out.meta.get("val", x.meta.get("val"))}
    out.replace_all_uses_with(made)
    for old in dict.fromkeys((out, node, x)):
        draft.graph.erase_node(old)


def _scaled(draft: Draft, kernel: fx.Node, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The packed weight, the steps times the gain, and the bias as it was."""
    owner, attribute, geometry = kernel.meta["filter"]
    packed, total = packed_filter(owner, attribute, geometry), draft.held(kernel.args[6])
    total = torch.zeros_like(gain) if total is None else total.double()
    step = (packed.step.double() * gain.abs()).float()
    if bool((gain < 0).any()):
        signs = torch.where(gain < 0, -1, 1).to(torch.int8).reshape(-1, *(1 for _ in geometry.stride), 1)
        packed = conv.pack(owner.pared_codes(attribute) * signs, step, geometry)
    return packed.weight, step, total


# What kernels can apply to their sums, from an operator's arguments after the input: name, numbers, algorithm.
_ACTIVATIONS: Final[dict[Any, Any]] = {
    _ATEN.relu.default: lambda: ("relu", [], ""),
    _ATEN.hardtanh.default: lambda low=-1.0, high=1.0: ("hardtanh", [float(low), float(high)], ""),
    _ATEN.clamp.default: lambda low=None, high=None: (
        ("hardtanh", [float(low), float(high)], "") if low is not None and high is not None else None
    ),
    _ATEN.relu6.default: lambda: ("hardtanh", [0.0, 6.0], ""),
    _ATEN.silu.default: lambda: ("swish", [], ""),
    _ATEN.hardswish.default: lambda: ("hardswish", [], ""),
    _ATEN.gelu.default: lambda approximate="none": ("gelu", [], approximate),
    _ATEN.leaky_relu.default: lambda slope=0.01: ("leaky_relu", [float(slope)], ""),
    _ATEN.tanh.default: lambda: ("tanh", [], ""),
}
# ... of which convolutions lack these, as long as PyTorch refuses them.
_LINEAR_ONLY: Final = ("gelu", "leaky_relu")


def _take_in(draft: Draft, node: fx.Node) -> None:
    """An activation becomes part of the product that it alone is applied to."""
    x, *rest = node.args
    if not _plain_kernel(x) or only_user(x) is not node:  # type: ignore[arg-type]  # a node, says the first
        return
    after = _ACTIVATIONS[node.target](*rest, **node.kwargs)
    if after is None or (x.target is not QLINEAR and after[0] in _LINEAR_ONLY):  # type: ignore[union-attr]  # a node
        return
    x.args = (*x.args[:-3], *after)  # type: ignore[union-attr]  # a node
    _skip(draft, node)


def _lift(draft: Draft, node: fx.Node) -> None:
    """Codes instead of floats are padded with zeros."""
    x, scale, zero_point, levels = node.args
    if not isinstance(x, fx.Node) or only_user(x) is not node:
        return
    if x.target is _ATEN.pad.default and _pads_space(x):
        codes = draft.before(x, quantize, x.args[0], scale, zero_point, levels)
        draft.replace(node, draft.before(node, pad_codes, codes, x.args[1], zero_point))
        draft.graph.erase_node(x)


def _pads_space(node: fx.Node) -> bool:
    """Whether zeros are put around dimensions of space only, and none are cut off."""
    _, sides, *rest = node.args
    mode, value = [*rest, *("constant", None)[len(rest) :]]
    space = rank_of(node.args[0]) - 2
    counts = [isinstance(one, int) and one >= 0 for one in sides]  # type: ignore[union-attr]  # a list
    return mode == "constant" and not value and space >= 1 and all(counts) and len(counts) <= 2 * space


def _give_codes(draft: Draft, node: fx.Node) -> None:
    """A product gives codes at once, where its output is only ever quantized, and only so."""
    x, scale, zero_point, levels = node.args
    if not isinstance(x, fx.Node) or x.target not in _KERNELS or only_user(x) is not node or levels != FULL_LEVELS:
        return
    if (node.target is quantize_rows_of_memory) != (x.target is QLINEAR) or x.args[-_AFTER:-3] != _PLAIN[:3]:
        return
    x.args = (*x.args[:-_AFTER], scale, zero_point, torch.uint8, *x.args[-3:])
    node.replace_all_uses_with(x)
    draft.graph.erase_node(node)
