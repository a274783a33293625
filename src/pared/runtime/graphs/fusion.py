"""Neighbours of int8 products join them: normalization and activation, and the next product's quantization.

Each rule looks at one operator and what it is applied to, and leaves the graph as it is where anything is unusual.
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
from pared.runtime.graphs.products import PLAIN, QCONVS, QLINEAR, joined, quantize_contiguous, quantize_contiguous_all
from pared.runtime.kernels import conv, linear
from pared.runtime.kernels.activation import quantize
from pared.runtime.kernels.conv import pad_codes
from pared.runtime.kernels.machine import FULL_LEVELS, has_tiles, operator_of
from pared.runtime.kernels.patches import channels_first, patches_of
from pared.runtime.layers.dispatch import packed_filter

_ATEN: Final = torch.ops.aten
_KERNELS: Final = (QLINEAR, *QCONVS)
_AFTER: Final = len(PLAIN)
_NORMS: Final = (_ATEN.batch_norm.default, _ATEN._native_batch_norm_legit_no_training.default)
# What `conv2d` takes after the weight, and `pad` after the sides, where it is not given.
_MOVES: Final[tuple[Any, ...]] = (None, [1, 1], [0, 0], [1, 1], 1)
_WITH_ZEROS: Final[tuple[Any, ...]] = ("constant", None)
# A convolution in float32 that can apply an activation.
FLOAT_CONV: Final = operator_of("mkldnn", "_convolution_pointwise")


def simplify(draft: Draft) -> None:
    """Drop what does nothing in inference, and let operators take any layout of memory."""
    for node in draft.calls(_ATEN.dropout.default, _ATEN.dropout_.default, _ATEN.feature_dropout.default):
        if not given_to(node)[2]:
            _skip(draft, node)
    for node in draft.calls(_ATEN.clone.default):
        # Nobody writes to what is still read, so a copy is as good as the original; but users may write to outputs.
        if not node.kwargs and all(user.op != "output" for user in node.users):
            _skip(draft, node)
    for node in draft.calls(_ATEN._assert_tensor_metadata.default):
        draft.graph.erase_node(node)  # the types of inputs are what graphs are chosen by
    for node in draft.calls(_ATEN.view.default, _ATEN._unsafe_view.default):
        node.target = _ATEN.reshape.default  # products may give another layout than float ones did


def _skip(draft: Draft, node: fx.Node) -> None:
    node.replace_all_uses_with(given_to(node)[0])
    draft.graph.erase_node(node)


def fuse(draft: Draft) -> None:
    """All rules, in the order in which one makes room for the next."""
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
        _part(draft, node)
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
    """Whether a node is a kernel that gives plain floats, to which it has applied nothing yet."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is FLOAT_CONV:
        return tuple(given_to(node)[-3:]) == PLAIN[-3:]
    return node.target in _KERNELS and tuple(given_to(node)[-_AFTER:]) == PLAIN


def channels_last(x: Tensor) -> Tensor:
    """An image in the layout in which convolutions are fast; it is copied if it has another."""
    return x.contiguous(memory_format=torch.channels_last)


def _lay_out(draft: Draft, node: fx.Node) -> None:
    """A float convolution of images runs on channels-last memory, and can then take in what follows it."""
    x, weight, *rest = given_to(node)
    bias, stride, padding, dilation, groups = (*rest, *_MOVES[len(rest) :])
    if FLOAT_CONV is None or rank_of(x) != 4 or type_of(x) is not torch.float32 or not draft.holds(weight, bias):
        return
    image = draft.before(node, channels_last, x)
    moves = [list(moved) * (2 // len(moved)) for moved in (padding, stride, dilation)]
    draft.replace(node, draft.before(node, FLOAT_CONV, image, weight, bias, *moves, groups, *PLAIN[-3:]))


def _fold_norm(draft: Draft, node: fx.Node) -> None:
    """A batch norm after a convolution is a gain and a shift of its channels: they go into its weight and its bias."""
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
        return  # a linear layer has no channels, and steps that took in a norm are not those of the packed filter
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
    """Pixels of a product of pixels are its rows."""
    x, *steps = given_to(node)
    if x.target is channels_first and all(one == 1 for sizes in steps for one in sizes):
        node.replace_all_uses_with(given_to(x)[0])
        draft.graph.erase_node(node)


def _behind(node: Any) -> Any:
    """The product of patches whose channels a node puts first, or the node itself."""
    if isinstance(node, fx.Node) and node.target is channels_first and only_user(given_to(node)[0]) is node:
        return given_to(node)[0]
    return node


def _scaled(draft: Draft, kernel: fx.Node, gain: Tensor, shift: Tensor) -> fx.Node:
    """The convolution with each channel times the gain, plus the shift.

    Of codes it is the steps that take the gain; where that is negative, the codes change their sign.
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
# ... of which int8 convolutions lack these, as long as PyTorch refuses them.
_LINEAR_ONLY: Final = ("gelu", "leaky_relu", "tanh")


def _take_in(draft: Draft, node: fx.Node) -> None:
    """An activation becomes part of the product that it alone is applied to."""
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


def _lift(draft: Draft, node: fx.Node) -> None:
    """Codes instead of floats are padded with zeros."""
    x, scale, zero_point, levels = given_to(node)
    if not isinstance(x, fx.Node) or only_user(x) is not node:
        return
    if x.target is _ATEN.pad.default and _pads_space(x):
        codes = draft.before(x, quantize, given_to(x)[0], scale, zero_point, levels)
        draft.replace(node, draft.before(node, pad_codes, codes, given_to(x)[1], zero_point))
        draft.graph.erase_node(x)


def _pad_inside(draft: Draft, node: fx.Node) -> None:
    """A convolution pads by itself: with zeros, and as much before as behind."""
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
    """A float convolution's weight in the kernel's own order, so that it is not arranged anew at every call."""
    packed = torch.ops.mkldnn._reorder_convolution_weight(draft.held(given_to(node)[1]), *given_to(node)[3:7])
    with draft.graph.inserting_before(node):
        node.args = (given_to(node)[0], draft.value(packed), *given_to(node)[2:])


def _widen(draft: Draft, kernel: fx.Node, before: list[int], behind: list[int]) -> bool:
    """Make room for as many zeros before as behind, by taps of zero; whether that was done.

    Padding floats takes a pass over memory, which costs more than the taps; padding codes hardly does.
    """
    more = [b - a for a, b in zip(before, behind, strict=True)]
    if kernel.target is not FLOAT_CONV or min(more) < 0 or any(one != 1 for one in given_to(kernel)[5]):
        return False
    weight = torch.nn.functional.pad(draft.held(given_to(kernel)[1]), [more[1], 0, more[0], 0])
    with draft.graph.inserting_before(kernel):
        kernel.args = (given_to(kernel)[0], draft.value(weight), *given_to(kernel)[2:])
    return True


def _pads_space(node: fx.Node) -> bool:
    """Whether zeros are put around dimensions of space only, and none are cut off."""
    _, sides, *rest = given_to(node)
    if node.target is pad_codes:
        return True
    mode, value = (*rest, *_WITH_ZEROS[len(rest) :])
    space = rank_of(given_to(node)[0]) - 2
    counts = [isinstance(one, int) and one >= 0 for one in sides]
    return mode == "constant" and not value and space >= 1 and all(counts) and len(counts) <= 2 * space


def _part(draft: Draft, node: fx.Node) -> None:
    """Outliers are computed a second time, by a product of their own: the large one can then give codes at once."""
    x, *grid, more, width = given_to(node)
    if x.target is not QLINEAR or only_user(x) is not node or grid[-1] != FULL_LEVELS:
        return  # no kernel gives codes of fewer levels
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
    """A product gives codes at once, where its output is only ever quantized, and only so."""
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
