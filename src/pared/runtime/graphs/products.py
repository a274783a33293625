"""Replace float products in a graph by products of weights in codes, first as modules would compute them.

A static product is then split into the quantization of its input and the kernel, so that both can be fused with their
neighbours (`fusion`); a dynamic one into the quantization of rows and the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pared.model.tensors import registered_as
from pared.runtime.graphs.capturing.capture import module_of
from pared.runtime.graphs.draft import Draft, given_to, rank_of
from pared.runtime.kernels.activation import quantize
from pared.runtime.kernels.conv import Geometry, pad_codes
from pared.runtime.kernels.fbgemm import rows as few
from pared.runtime.kernels.linear import product_of_rows, quantize_all, rows_of, static
from pared.runtime.kernels.machine import PLAIN, operator_of
from pared.runtime.kernels.outliers import ExtraColumns, extra_columns
from pared.runtime.kernels.patches import channels_first, patches_of
from pared.runtime.layers.counterpart import Counterpart
from pared.runtime.layers.dispatch import packed_filter, packed_linear, run_kernel, takes

_ATEN: Final = torch.ops.aten
# The operators of a graph, and the functions that they come from; the arguments after the weight are the same.
_FUNCTIONS: Final[Mapping[object, Callable[..., Tensor]]] = {
    _ATEN.linear.default: F.linear,
    _ATEN.conv1d.default: F.conv1d,
    _ATEN.conv1d.padding: F.conv1d,
    _ATEN.conv2d.default: F.conv2d,
    _ATEN.conv2d.padding: F.conv2d,
    _ATEN.conv3d.default: F.conv3d,
    _ATEN.conv3d.padding: F.conv3d,
    _ATEN.conv_transpose1d.default: F.conv_transpose1d,
    _ATEN.conv_transpose2d.input: F.conv_transpose2d,
    _ATEN.embedding.default: F.embedding,
}
_CONVOLUTIONS: Final = (F.conv1d, F.conv2d, F.conv3d)
# None in a build without them, in which no layer runs on codes.
QLINEAR: Final = operator_of("onednn", "qlinear_pointwise")
QCONVS: Final = tuple(operator_of("onednn", f"qconv{n}d_pointwise") for n in (1, 2, 3))


def quantize_contiguous(x: Tensor, scale: float, zero_point: int, levels: int) -> Tensor:
    """The codes of a linear layer's input, in contiguous memory as its kernel needs them."""
    return quantize(x.contiguous(), scale, zero_point, levels)


def quantize_contiguous_all(
    x: Tensor, scale: float, zero_point: int, levels: int, more: ExtraColumns, width: int
) -> Tensor:
    """The codes of a linear layer's input with those of extra columns, in contiguous memory."""
    return quantize_all(x.contiguous(), scale, zero_point, levels, more, width)


def joined(codes: Tensor, x: Tensor, more: ExtraColumns, width: int) -> Tensor:
    """The codes from a product, with those of extra columns."""
    whole = codes.new_empty((*codes.shape[:-1], width))
    inputs = codes.shape[-1]
    whole[..., :inputs] = codes
    more.codes(x, whole[..., inputs : inputs + len(more.columns)])
    return whole


def place(draft: Draft, model: nn.Module, tensors: Mapping[fx.Node, str]) -> None:
    """Let products run on codes where the model's own modules do.

    Args:
        draft: the captured graph; placeholders of the model's tensors are replaced by values.
        model: the quantized model.
        tensors: the dotted names of tensors, by placeholder.
    """
    for placeholder, name in tensors.items():
        for node in list(placeholder.users):
            counterpart = _owner(node, placeholder, name, model)
            if counterpart is not None:
                _place(draft, node, counterpart, name.rpartition(".")[2])
    for placeholder, name in tensors.items():
        if placeholder.users:
            with draft.graph.inserting_before(placeholder):
                placeholder.replace_all_uses_with(draft.value(_floats(model, name)))
        draft.graph.erase_node(placeholder)


def _owner(node: fx.Node, weight: fx.Node, name: str, model: nn.Module) -> Counterpart | None:
    """The counterpart of the weight, if its own forward computes this product; else None."""
    function = _FUNCTIONS.get(node.target)
    place = 0 if function is F.embedding else 1
    if function is None or len(given_to(node)) <= place or given_to(node)[place] is not weight:
        return None
    inner = module_of(node)
    home, _, attribute = name.rpartition(".")
    owner = model.get_submodule(home)
    if inner != home and dict(model.named_modules(remove_duplicate=False)).get(inner) is not owner:
        return None
    if not isinstance(owner, Counterpart) or owner.pared_activation is None or attribute not in owner.pared_views:
        return None
    if owner._pared_forward is not None:
        return None
    return owner if takes(function, owner, attribute) else None


def _floats(model: nn.Module, name: str) -> Tensor:
    """A tensor of the model, decoded if it is in codes."""
    module, _, attribute = name.rpartition(".")
    owner = model.get_submodule(module)
    if isinstance(owner, Counterpart) and attribute in owner.pared_views:
        return owner.pared_decode(attribute)
    return registered_as(owner, attribute).detach()


def _place(draft: Draft, node: fx.Node, owner: Counterpart, attribute: str) -> None:
    function = _FUNCTIONS[node.target]
    weight = 0 if function is F.embedding else 1
    args = [argument for i, argument in enumerate(given_to(node)) if i != weight]
    draft.replace(node, draft.before(node, run_kernel, function, owner, attribute, *args, **node.kwargs))


def take_apart(draft: Draft) -> None:
    """Split products into quantization and kernel if the input has the usual number of dimensions."""
    for node in draft.calls(run_kernel):
        function, held = (draft.held(one) for one in given_to(node)[:2])
        attribute, x, *rest = given_to(node)[2:]
        value = x.meta.get("val")
        if held.pared_in_bfloat16 or value is None or value.dtype is not torch.float32 or not draft.holds(*rest[:1]):
            continue
        activation = held.pared_activation
        assert activation is not None, "it runs on codes"
        if function is F.linear and rank_of(x) > 1:
            (_static_linear if activation.mode == "static" else _dynamic_linear)(draft, node, held, attribute, x, *rest)
        elif function in _CONVOLUTIONS and activation.mode == "static":
            geometry = Geometry.of(held.pared_codes(attribute).shape[2:], *rest[1:], **dict[str, Any](node.kwargs))
            if rank_of(x) == len(geometry.stride) + 2:
                _static_convolution(draft, node, held, attribute, x, geometry, rest[0] if rest else None)


def _bias(draft: Draft, bias: Any) -> Tensor | None:
    found = draft.held(bias)
    return None if found is None else found.float()


def _static_linear(
    draft: Draft, node: fx.Node, owner: Counterpart, attribute: str, x: fx.Node, bias: Any = None
) -> None:
    packed, activation = packed_linear(owner, attribute), owner.pared_activation
    assert activation is not None, "it runs on codes"
    if _is_step(x):
        scaled = _scaled(draft, node, owner, attribute, x)
        given = (scaled, packed, _bias(draft, bias), activation.span, activation.outliers)
        found = draft.before(node, static, *given)
        found.meta["linear"] = (owner, attribute)
        draft.replace(node, found)
        return
    scale, zero_point = activation.span.grid(packed.levels)
    grid, x = (scale, zero_point, packed.levels), _scaled(draft, node, owner, attribute, x)
    if activation.outliers:
        more = extra_columns(activation.outliers, activation.span, packed.levels)
        codes = draft.before(node, quantize_contiguous_all, x, *grid, more, packed.width)
    else:
        codes = draft.before(node, quantize_contiguous, x, *grid)
    weight = (packed.weight, packed.step, packed.zeros, _bias(draft, bias))
    made = draft.before(node, QLINEAR, codes, scale, zero_point, *weight, *PLAIN)
    made.meta["linear"] = (owner, attribute)
    draft.replace(node, made)


def _scaled(draft: Draft, node: fx.Node, owner: Counterpart, attribute: str, x: fx.Node) -> fx.Node:
    """The input times the scales of the weight's columns, if they have some; once for all weights of equal scales."""
    scale = owner.pared_scale(attribute)
    if scale is None:
        return x
    for user in x.users:
        known = user.meta.get("scales")
        if known is not None and torch.equal(known, scale):
            return user
    made = draft.before(node, _ATEN.mul.Tensor, x, scale)
    made.meta["scales"] = scale
    return made


def _dynamic_linear(
    draft: Draft, node: fx.Node, owner: Counterpart, attribute: str, x: fx.Node, bias: Any = None
) -> None:
    packed = packed_linear(owner, attribute)
    rows = draft.before(node, rows_of, _scaled(draft, node, owner, attribute, x), packed.levels)
    made = draft.before(node, product_of_rows, rows, packed, _bias(draft, bias))
    made.meta["linear"] = (owner, attribute)
    draft.replace(node, made)


def _is_step(x: fx.Node) -> bool:
    """Whether an input has a single token for each sample, of which there will be few."""
    sizes = x.meta["val"].shape[1:-1]
    return few.available() and len(sizes) > 0 and all(isinstance(size, int) and size == 1 for size in sizes)


def _static_convolution(
    draft: Draft, node: fx.Node, owner: Counterpart, attribute: str, x: fx.Node, geometry: Geometry, bias: Any
) -> None:
    packed = packed_filter(owner, attribute, geometry)
    scale, zero_point = owner.pared_activation.span.grid(packed.levels)  # type: ignore[union-attr]  # it has one
    codes, padding = draft.before(node, quantize, x, scale, zero_point, packed.levels), geometry.padding
    if any(geometry.sides) and (zero_point or any(geometry.trailing) or packed.taps):
        codes, padding = draft.before(node, pad_codes, codes, geometry.sides, zero_point), (0,) * len(padding)
    shift = packed.sums * (-scale * zero_point)
    given = _bias(draft, bias)
    weight = (packed.weight, packed.step, packed.zeros, shift if given is None else shift + given)
    if packed.taps:
        rows = draft.before(node, patches_of, codes, packed.taps, geometry.stride)
        product = draft.before(node, QLINEAR, rows, scale, 0, *weight, *PLAIN)
        product.meta["filter"] = (owner, attribute, geometry)
        draft.replace(node, draft.before(node, channels_first, product))
        return
    moves = (geometry.stride, padding, geometry.dilation, geometry.groups)
    made = draft.before(node, QCONVS[len(padding) - 1], codes, scale, 0, *weight, *moves, *PLAIN)
    made.meta["filter"] = (owner, attribute, geometry)
    draft.replace(node, made)


def share(draft: Draft) -> None:
    """Quantize an input that several products share only once."""
    known: dict[object, fx.Node] = {}
    for node in draft.calls(quantize, quantize_contiguous, quantize_contiguous_all, rows_of):
        key = (node.target, *(one.target if draft.holds(one) and one else one for one in given_to(node)))
        if key in known:
            draft.replace(node, known[key])
        else:
            known[key] = node
