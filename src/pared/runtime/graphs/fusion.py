"""Fuse int8 products with their neighbours: normalization, activation, and the quantization for the next product.

Each rule looks at one operator and its input, and leaves the graph as it is if anything is unusual.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, fx

from pared.runtime.graphs.attention import run_in_bfloat16, share_masks
from pared.runtime.graphs.draft import Draft, given_to, only_user, rank_of, type_of
from pared.runtime.graphs.merging import merge, take_sums
from pared.runtime.graphs.products import QCONVS, QLINEAR, joined, quantize_contiguous, quantize_contiguous_all
from pared.runtime.kernels import conv, linear
from pared.runtime.kernels.activation import quantize
from pared.runtime.kernels.conv import pad_codes
from pared.runtime.kernels.machine import FULL_LEVELS, PLAIN, has_tiles, operator_of
from pared.runtime.kernels.patches import channels_first, patches_of
from pared.runtime.layers.dispatch import packed_filter

_ATEN: Final = torch.ops.aten
_KERNELS: Final = (QLINEAR, *QCONVS)
_AFTER: Final = len(PLAIN)
_NORMS: Final = (_ATEN.batch_norm.default, _ATEN._native_batch_norm_legit_no_training.default)
# The defaults of `conv2d` after the weight, and of `pad` after the sides.
_MOVES: Final[tuple[Any, ...]] = (None, [1, 1], [0, 0], [1, 1], 1)
_WITH_ZEROS: Final[tuple[Any, ...]] = ("constant", None)
# A convolution in float32 that can apply an activation.
FLOAT_CONV: Final = operator_of("mkldnn", "_convolution_pointwise")


def simplify(draft: Draft) -> None:
    """Drop operators that do nothing in inference, and let the others take any layout of memory."""
    for node in draft.calls(_ATEN.dropout.default, _ATEN.dropout_.default, _ATEN.feature_dropout.default):
        if not given_to(node)[2]:
            _skip(draft, node)
    for node in draft.calls(_ATEN.clone.default):
        # Nothing writes to a tensor that is still read, so the original will do; but users may write to outputs.
        if not node.kwargs and all(user.op != "output" for user in node.users):
            _skip(draft, node)
    for node in draft.calls(_ATEN._assert_tensor_metadata.default):
        draft.graph.erase_node(node)  # graphs are chosen by the types of inputs
    for node in draft.calls(_ATEN.view.default, _ATEN._unsafe_view.default):
        node.target = _ATEN.reshape.default  # int8 products may give another layout than float ones


def _skip(draft: Draft, node: fx.Node) -> None:
    node.replace_all_uses_with(given_to(node)[0])
    draft.graph.erase_node(node)


def fuse(draft: Draft) -> None:
    """Apply all rules, in an order in which each prepares for the next."""
    for node in draft.calls(_ATEN.conv2d.default):
        _lay_out(draft, node)
    for node in draft.calls(*_NORMS):
        _fold_norm(draft, node)
    for node in draft.calls(*_ACTIVATIONS):
        _take_in(draft, node)
    for node in draft.calls(quantize):
        _lift(draft, node)
    for node in draft.calls(pad_codes, _ATEN.pad.default):
        _pad_inside(draft, node)
    share_masks(draft)
    for node in draft.calls(quantize_contiguous_all):
        _split_outliers(draft, node)
    for node in draft.calls(quantize, quantize_contiguous):
        _give_codes(draft, node)
    for node in draft.calls(patches_of):
        _straighten(draft, node)
    merge(draft)
    take_sums(draft)
    if has_tiles():
        run_in_bfloat16(draft)
    for node in draft.calls(FLOAT_CONV):
        _pack(draft, node)


def _plain_kernel(node: Any) -> bool:
    """Whether a node is a kernel that gives floats and applies no activation yet."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is FLOAT_CONV:
        return tuple(given_to(node)[-3:]) == PLAIN[-3:]
    return node.target in _KERNELS and tuple(given_to(node)[-_AFTER:]) == PLAIN


def channels_last(x: Tensor) -> Tensor:
    """An image in the layout in which convolutions are fast, copied if necessary."""
    return x.contiguous(memory_format=torch.channels_last)


def _lay_out(draft: Draft, node: fx.Node) -> None:
    """Run a float convolution of images on channels-last memory, by an operator that can apply an activation."""
    x, weight, *rest = given_to(node)
    bias, stride, padding, dilation, groups = (*rest, *_MOVES[len(rest) :])
    if FLOAT_CONV is None or rank_of(x) != 4 or type_of(x) is not torch.float32 or not draft.holds(weight, bias):
        return
    image = draft.before(node, channels_last, x)
    moves = [list(moved) * (2 // len(moved)) for moved in (padding, stride, dilation)]
    draft.replace(node, draft.before(node, FLOAT_CONV, image, weight, bias, *moves, groups, *PLAIN[-3:]))


def _fold_norm(draft: Draft, node: fx.Node) -> None:
    """Fold a batch norm, a gain and a shift of each channel, into the weight and bias of the convolution before it."""
    x, *parts = given_to(node)[:5]
    kernel, out = _behind(x), node
    if node.target is not _ATEN.batch_norm.default:
        first = only_user(node)
        if first is None or first.target is not operator.getitem or first.args[1] != 0:
            return
        out = first
    elif given_to(node)[5]:  # training
        return
    if only_user(x) is not node or not _plain_kernel(kernel) or None in parts[2:] or not draft.holds(*parts):
        return
    if kernel.target is not FLOAT_CONV and "filter" not in kernel.meta:
        return  # a linear layer has no channels, and a norm was already folded into steps that are not the filter's
    weight, bias, mean, variance = (draft.held(one) for one in parts)
    gain = (variance.double() + given_to(node)[7 if out is node else 6]).rsqrt()
    gain = gain if weight is None else gain * weight.double()
    shift = -mean.double() * gain
    made = _scaled(draft, kernel, gain, shift if bias is None else shift + bias.double())
    made.meta = {key: value for key, value in kernel.meta.items() if key != "filter"}
    if kernel is not x:
        made = draft.before(x, channels_first, made)
    made.meta["val"] = out.meta.get("val", x.meta.get("val"))
    out.replace_all_uses_with(made)
    for old in dict.fromkeys((out, node, x, kernel)):
        draft.graph.erase_node(old)


def _straighten(draft: Draft, node: fx.Node) -> None:
    """Drop the patches of a product of single pixels: its rows are the pixels."""
    x, *steps = given_to(node)
    if x.target is channels_first and all(size == 1 for sizes in steps for size in sizes):
        node.replace_all_uses_with(given_to(x)[0])
        draft.graph.erase_node(node)


def _behind(node: Any) -> Any:
    """The product of patches if a node puts its channels first, else the node."""
    if isinstance(node, fx.Node) and node.target is channels_first and only_user(given_to(node)[0]) is node:
        return given_to(node)[0]
    return node


def _scaled(draft: Draft, kernel: fx.Node, gain: Tensor, shift: Tensor) -> fx.Node:
    """The convolution with each channel multiplied by the gain and moved by the shift.

    With codes, the gain goes into the steps; where it is negative, the codes change their sign.
    """
    place = 2 if kernel.target is FLOAT_CONV else 6
    bias = draft.held(given_to(kernel)[place])
    total = (shift if bias is None else bias.double() * gain + shift).float()
    per_channel = gain.reshape(-1, 1, 1, 1)
    assert callable(kernel.target), "an operator"
    if kernel.target is FLOAT_CONV:
        weight = draft.held(given_to(kernel)[1])
        scaled = (weight.double() * per_channel).float().contiguous(memory_format=torch.channels_last)
        return draft.before(kernel, kernel.target, given_to(kernel)[0], scaled, total, *given_to(kernel)[3:])
    owner, attribute, geometry = kernel.meta["filter"]
    packed = packed_filter(owner, attribute, geometry)
    step = (packed.step.double() * gain.abs()).float()
    if bool((gain < 0).any()):
        codes = owner.pared_codes(attribute)
        signs = torch.where(gain < 0, -1, 1).to(torch.int8).reshape(-1, *(1 for _ in codes.shape[1:]))
        packed = conv.pack(codes * signs, step, geometry)
    given = (*given_to(kernel)[:3], packed.weight, step, given_to(kernel)[5], total, *given_to(kernel)[7:])
    return draft.before(kernel, kernel.target, *given)


# The activations that kernels can apply, from an operator's arguments after the input: name, numbers, algorithm.
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
# Those that PyTorch refuses for int8 convolutions.
_LINEAR_ONLY: Final = ("gelu", "leaky_relu", "tanh")


def _take_in(draft: Draft, node: fx.Node) -> None:
    """Let a product apply the activation that follows it, if nothing else reads the product."""
    x, *rest = given_to(node)
    if isinstance(x, fx.Node) and x.target is channels_first and only_user(x) is node:
        node.args = (given_to(x)[0], *rest)  # before the view
        x.args = (node,)
        node.replace_all_uses_with(x, delete_user_cb=lambda user: user is not x)
        x.append(node)
        node.append(x)
        x = given_to(node)[0]
    if not _plain_kernel(x) or only_user(x) is not node or any(isinstance(one, fx.Node) for one in rest):
        return
    after = _ACTIVATIONS[node.target](*rest, **node.kwargs)
    if after is None or (x.target in QCONVS and after[0] in _LINEAR_ONLY):
        return
    x.args = (*given_to(x)[:-3], *after)
    _skip(draft, node)


def hides_nan(node: fx.Node) -> bool:
    """Whether a node is a float convolution with an activation that makes NaN a number: oneDNN takes a maximum."""
    return node.target is FLOAT_CONV and given_to(node)[-3] in ("relu", "hardtanh")


def _lift(draft: Draft, node: fx.Node) -> None:
    """Pad codes instead of floats."""
    x, scale, zero_point, levels = given_to(node)
    if not isinstance(x, fx.Node) or only_user(x) is not node:
        return
    if x.target is _ATEN.pad.default and _pads_space(x):
        codes = draft.before(x, quantize, given_to(x)[0], scale, zero_point, levels)
        draft.replace(node, draft.before(node, pad_codes, codes, given_to(x)[1], zero_point))
        draft.graph.erase_node(x)


def _pad_inside(draft: Draft, node: fx.Node) -> None:
    """Let a convolution pad its input, which it can do with zeros, equally on both sides."""
    user = only_user(node)
    if user is not None and user.target is channels_last:
        user = only_user(user)
    if user is None or user.target not in (FLOAT_CONV, *QCONVS) or not _pads_space(node):
        return
    if (node.target is pad_codes) != (user.target in QCONVS) or (node.target is pad_codes and given_to(node)[2] != 0):
        return
    place = 3 if user.target is FLOAT_CONV else 8
    sides = list(given_to(node)[1]) + [0] * (2 * len(given_to(user)[place]) - len(given_to(node)[1]))
    before, behind = sides[0::2][::-1], sides[1::2][::-1]
    if before != behind and not _widen(draft, user, before, behind):
        return
    padding = [a + b for a, b in zip(given_to(user)[place], behind, strict=True)]
    user.args = (*given_to(user)[:place], padding, *given_to(user)[place + 1 :])
    _skip(draft, node)


def _pack(draft: Draft, node: fx.Node) -> None:
    """Pack a float convolution's weight in the kernel's own order, or it would be rearranged at every call."""
    packed = torch.ops.mkldnn._reorder_convolution_weight(draft.held(given_to(node)[1]), *given_to(node)[3:7])
    with draft.graph.inserting_before(node):
        node.args = (given_to(node)[0], draft.value(packed), *given_to(node)[2:])


def _widen(draft: Draft, kernel: fx.Node, before: list[int], behind: list[int]) -> bool:
    """Make padding symmetric by adding taps of zero to the filter; whether that was possible.

    Padding floats takes a pass over memory, which costs more than the taps; padding codes costs little.
    """
    more = [b - a for a, b in zip(before, behind, strict=True)]
    if kernel.target is not FLOAT_CONV or min(more) < 0 or any(distance != 1 for distance in given_to(kernel)[5]):
        return False
    weight = torch.nn.functional.pad(draft.held(given_to(kernel)[1]), [more[1], 0, more[0], 0])
    with draft.graph.inserting_before(kernel):
        kernel.args = (given_to(kernel)[0], draft.value(weight), *given_to(kernel)[2:])
    return True


def _pads_space(node: fx.Node) -> bool:
    """Whether a node pads spatial dimensions only, with zeros, and crops nothing."""
    _, sides, *rest = given_to(node)
    if node.target is pad_codes:
        return True
    mode, value = (*rest, *_WITH_ZEROS[len(rest) :])
    space = rank_of(given_to(node)[0]) - 2
    counts = [isinstance(side, int) and side >= 0 for side in sides]
    return mode == "constant" and not value and space >= 1 and all(counts) and len(counts) <= 2 * space


def _split_outliers(draft: Draft, node: fx.Node) -> None:
    """Compute outlier columns again, by a small product of floats, so that the large product can give codes."""
    x, *grid, more, width = given_to(node)
    if x.target is not QLINEAR or only_user(x) is not node or grid[-1] != FULL_LEVELS:
        return  # kernels only give codes of all levels
    found = draft.held(more)
    columns, places = found.columns.unique(return_inverse=True)
    owner, attribute = x.meta["linear"]
    activation = owner.pared_activation
    packed = linear.pack(
        owner.pared_codes(attribute)[columns], owner.pared_row_steps(attribute)[columns], activation.outliers
    )
    bias = draft.held(given_to(x)[6])
    weight = (packed.weight, packed.step, packed.zeros, None if bias is None else bias[columns])
    part = draft.before(x, QLINEAR, *given_to(x)[:3], *weight, *given_to(x)[-_AFTER:])
    codes = draft.before(node, quantize_contiguous, x, *grid)
    draft.replace(node, draft.before(node, joined, codes, part, replace(found, columns=places), width))


def _give_codes(draft: Draft, node: fx.Node) -> None:
    """Let a product give codes if its output is only read to be quantized on one grid."""
    x, scale, zero_point, levels = given_to(node)
    kernel = _behind(x)
    if not isinstance(x, fx.Node) or kernel.target not in _KERNELS or only_user(x) is not node or levels != FULL_LEVELS:
        return
    as_rows = kernel is x and kernel.target is QLINEAR
    if (node.target is quantize_contiguous) != as_rows or given_to(kernel)[-_AFTER:-3] != PLAIN[:3]:
        return
    kernel.args = (*given_to(kernel)[:-_AFTER], scale, zero_point, torch.uint8, *given_to(kernel)[-3:])
    node.replace_all_uses_with(x)
    draft.graph.erase_node(node)
