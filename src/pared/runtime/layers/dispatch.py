"""The table of kernels: what runs instead of a float function whose weight is in codes, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pared.formats.activation import Activation
from pared.formats.views import View
from pared.runtime.kernels import conv, linear, transposed
from pared.runtime.kernels.activation import NotFiniteError
from pared.runtime.kernels.conv import Geometry
from pared.runtime.kernels.transposed import Moves
from pared.runtime.layers.casts import cast_floats


class Owner(Protocol):
    """The part of a `Counterpart` that kernels use."""

    pared_activation: Activation | None
    pared_views: dict[str, View]
    pared_dtypes: dict[str, torch.dtype]
    pared_in_bfloat16: bool

    def pared_codes(self, attribute: str) -> Tensor: ...  # noqa: D102  # see Weights, Counterpart
    def pared_shape(self, attribute: str) -> torch.Size: ...  # noqa: D102  # see Weights, Counterpart
    def pared_rows(self, attribute: str, indices: Tensor) -> Tensor: ...  # noqa: D102  # see Weights, Counterpart
    def pared_step(self, attribute: str) -> Tensor: ...  # noqa: D102  # see Weights, Counterpart
    def pared_scale(self, attribute: str) -> Tensor | None: ...  # noqa: D102  # see Weights, Counterpart
    def pared_decode(self, attribute: str) -> Tensor: ...  # noqa: D102  # see Weights, Counterpart
    def pared_row_steps(self, attribute: str, outputs: int = 0) -> Tensor: ...  # noqa: D102  # see Weights, Counterpart
    def pared_packed(self, key: object, pack: Callable[[], Any]) -> Any: ...  # noqa: D102  # see Weights, Counterpart


def _activation(owner: Owner) -> Activation:
    assert owner.pared_activation is not None, "a module that runs on floats has no handles"
    return owner.pared_activation


def packed_linear(owner: Owner, attribute: str) -> linear.PackedLinear:
    """A weight of `F.linear`, packed for its kernel."""
    packed: linear.PackedLinear = owner.pared_packed(
        attribute,
        lambda: linear.pack(
            owner.pared_codes(attribute), owner.pared_row_steps(attribute), _activation(owner).outliers
        ),
    )
    return packed


def packed_filter(owner: Owner, attribute: str, geometry: Geometry) -> conv.PackedConv:
    """The weight of a convolution, packed for its kernel."""
    packed: conv.PackedConv = owner.pared_packed(
        (attribute, geometry),
        lambda: conv.pack(owner.pared_codes(attribute), owner.pared_row_steps(attribute), geometry),
    )
    return packed


def linear_product(owner: Owner, attribute: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The counterpart of `F.linear`."""
    packed = packed_linear(owner, attribute)
    activation = _activation(owner)
    scale = owner.pared_scale(attribute)
    # A column's scale is its input's as well. The product may be beyond float16, as the layer's output is not.
    given = x if scale is None else x.float() * scale
    if activation.mode == "dynamic":
        return linear.dynamic(given, packed, bias).to(x.dtype)
    return linear.static(given, packed, bias, activation.span, activation.outliers).to(x.dtype)


def _convolution(
    owner: Owner, attribute: str, x: Tensor, bias: Tensor | None = None, *moves: Any, **named_moves: Any
) -> Tensor:
    """The counterpart of `F.conv1d`, `F.conv2d` and `F.conv3d`: stride, padding, dilation and groups are `moves`."""
    geometry = Geometry.of(owner.pared_shape(attribute)[2:], *moves, **named_moves)
    packed = packed_filter(owner, attribute, geometry)
    activation = _activation(owner)
    if activation.mode == "dynamic":
        return conv.dynamic(x, packed, bias)
    return conv.static(x, packed, bias, activation.span)


def _transposed(
    owner: Owner, attribute: str, x: Tensor, bias: Tensor | None = None, *moves: Any, **named_moves: Any
) -> Tensor:
    """The counterpart of `F.conv_transpose1d` and `F.conv_transpose2d`, for a single group."""
    codes = owner.pared_codes(attribute)
    taps = tuple(codes.shape[2:])
    packed = owner.pared_packed(attribute, lambda: transposed.pack(codes, owner.pared_row_steps(attribute, 1)))
    activation = _activation(owner)
    span = activation.span if activation.mode == "static" else None
    return transposed.run(x, packed, bias, taps, Moves.of(len(taps), *moves, **named_moves), span)


def _rows(owner: Owner, attribute: str, indices: Tensor) -> Tensor:
    """Rows of a table as floats; only these are decoded."""
    rows = owner.pared_rows(attribute, indices).to(torch.float32)
    step = owner.pared_step(attribute)
    per_row = bool(owner.pared_views[attribute].rows)
    rows.mul_(F.embedding(indices, step.reshape(-1, 1)) if per_row else step)
    scale = owner.pared_scale(attribute)
    return rows if scale is None else rows.mul_(scale)


def _embedding(owner: Owner, attribute: str, indices: Tensor, *training: Any, **more_training: Any) -> Tensor:
    """The counterpart of `F.embedding`, whose options concern training or are never in use."""
    del training, more_training
    return _rows(owner, attribute, indices).to(owner.pared_dtypes[attribute])


def _embedding_bag(
    owner: Owner,
    attribute: str,
    indices: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """The counterpart of `F.embedding_bag`, on a small table of the rows that are looked up, in their order."""
    del max_norm, norm_type, scale_grad_by_freq, sparse
    table = _rows(owner, attribute, indices.reshape(-1))
    places = torch.arange(len(table), device=indices.device).reshape(indices.shape)
    if padding_idx is not None and indices.numel():
        padding = padding_idx % owner.pared_shape(attribute)[0]
        places = torch.where(indices == padding, len(table), places)
        padding_idx, table = len(table), torch.cat([table, torch.zeros_like(table[:1])])
    weights = None if per_sample_weights is None else per_sample_weights.float()
    out = F.embedding_bag(
        places,
        table,
        offsets,
        mode=mode,
        per_sample_weights=weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )
    return out.to(owner.pared_dtypes[attribute])


KERNELS: Final[dict[Callable[..., Any], Callable[..., Tensor]]] = {
    F.linear: linear_product,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.conv_transpose1d: _transposed,
    F.conv_transpose2d: _transposed,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
}

# The dimension of the weight that counts a function's outputs, where it is not the first: kernels need the steps along
# this dimension.
OUTPUTS: Final[dict[Callable[..., Any], int]] = {F.conv_transpose1d: 1, F.conv_transpose2d: 1}


# The functions whose weights may have columns with scales.
_SCALED: Final = (F.linear, F.embedding, F.embedding_bag)


def takes(func: Callable[..., Any], owner: Owner, attribute: str) -> bool:
    """Whether a function's kernel takes a weight: its rows are the outputs, or those that are looked up."""
    rows = owner.pared_views[attribute].rows
    return rows in ((), (OUTPUTS.get(func, 0),)) and (func in _SCALED or owner.pared_scale(attribute) is None)


def run_kernel(func: Callable[..., Any], owner: Owner, attribute: str, x: Tensor, *rest: Any, **named: Any) -> Tensor:
    """The product with one of the owner's weights, by the kernel that was measured to be fastest."""
    if not owner.pared_in_bfloat16:
        try:
            return KERNELS[func](owner, attribute, x, *rest, **named)
        except NotFiniteError:
            return _with_what_is_not_finite(func, owner, attribute, x, *rest, **named)
    weight = owner.pared_packed((attribute, "bfloat16"), lambda: owner.pared_decode(attribute).bfloat16())
    rest, named = cast_floats((rest, named), torch.bfloat16)
    out: Tensor = func(x.bfloat16(), weight, *rest, **named)
    return out.to(x.dtype)


def _with_what_is_not_finite(
    func: Callable[..., Any], owner: Owner, attribute: str, x: Tensor, *rest: Any, **named: Any
) -> Tensor:
    """The product for an input with NaN or Inf: not finite where the float layer's is, else as without them."""
    clean = KERNELS[func](owner, attribute, x.nan_to_num(0.0, 0.0, 0.0), *rest, **named)
    rest, named = cast_floats((rest, named), torch.float32)
    exact = func(x.detach().float(), owner.pared_decode(attribute).float(), *rest, **named).to(clean.dtype)
    return torch.where(exact.isfinite(), clean, exact)
