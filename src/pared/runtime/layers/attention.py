"""The forward of MultiheadAttention with its projections on codes, and the fast paths that would bypass it."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.runtime.kernels import linear
from pared.runtime.layers.counterpart import Counterpart
from pared.runtime.layers.dispatch import linear_product


def attention_weights(module: nn.MultiheadAttention) -> tuple[str, ...]:
    """The weights of the projections: one for all three inputs, or one for each; none if there is no kernel."""
    if module.bias_k is not None or module.add_zero_attn:
        return ()
    return (
        ("in_proj_weight",)
        if module.in_proj_weight is not None
        else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    )


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """The output of `nn.MultiheadAttention.forward` (Vaswani et al. 2017) for a batch, or NotImplemented."""
    if not _serves(module, query, key, value, key_padding_mask, attn_mask):
        return NotImplemented
    if (module.training and module.dropout) or (
        is_causal and attn_mask is None
    ):  # the latter is an error that the float layer reports
        return NotImplemented
    inputs = [query, key, value] if module.batch_first else [x.transpose(0, 1) for x in (query, key, value)]
    same = query is key and key is value
    heads = (module.num_heads, -1)
    q, k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in _projected(module, inputs, same))
    mask = _merged(module, q, k, key_padding_mask, attn_mask)
    weights = None
    if need_weights:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = (scores if mask is None else scores + mask).softmax(-1)
        context = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        context = F.scaled_dot_product_attention(q, k, v, mask)
    out = module.out_proj(context.transpose(1, 2).flatten(2))
    return (out if module.batch_first else out.transpose(0, 1).contiguous()), weights


def _serves(
    module: Any, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> bool:
    """Whether the inputs have a batch, and all shapes and types are as PyTorch documents them."""
    if query.dim() != 3 or key.dim() != 3 or query.is_nested or not query.numel() or not key.numel():
        return False
    batch, steps = (0, 1) if module.batch_first else (1, 0)
    n, length, keys = query.shape[batch], query.shape[steps], key.shape[steps]
    if key.shape[batch] != n or value.shape[:2] != key.shape[:2]:
        return False
    shapes = ((key_padding_mask, [(n, keys)]), (attn_mask, [(length, keys), (n * module.num_heads, length, keys)]))
    return all(
        mask is None or (tuple(mask.shape) in fit and (mask.dtype is torch.bool or mask.is_floating_point()))
        for mask, fit in shapes
    )


def _projected(module: Any, inputs: list[Tensor], same: bool) -> list[Tensor]:
    """Queries, keys and values, each of shape (batch, length, width)."""
    width = module.embed_dim
    if "in_proj_weight" not in module.pared_views:
        names, biases = ("q_proj_weight", "k_proj_weight", "v_proj_weight"), [None] * 3
        if module.in_proj_bias is not None:
            biases = list(module.in_proj_bias.detach().split(width))
        return [linear_product(module, name, x, b) for name, x, b in zip(names, inputs, biases, strict=True)]
    if same:
        return list(linear_product(module, "in_proj_weight", inputs[0], module.in_proj_bias).split(width, dim=-1))
    return [_third(module, i, x) for i, x in enumerate(inputs)]


def _third(module: Any, which: int, x: Tensor) -> Tensor:
    """The product with one third of the weight for all inputs."""
    rows = slice(which * module.embed_dim, (which + 1) * module.embed_dim)

    def pack() -> linear.PackedLinear:
        steps = module.pared_row_steps("in_proj_weight")[rows].contiguous()
        return linear.pack(module.pared_codes("in_proj_weight")[rows].contiguous(), steps)

    bias = None if module.in_proj_bias is None else module.in_proj_bias[rows]
    return linear.dynamic(x, module.pared_packed(("in_proj_weight", which), pack), bias)


def _merged(
    module: Any, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> Tensor | None:
    """Both masks as one to add to the scores, which broadcasts to (batch, heads, queries, keys)."""
    merged = None
    if key_padding_mask is not None:
        merged = _additive(key_padding_mask, q.dtype)[:, None, None, :]
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        mask = mask.reshape(-1, module.num_heads, q.shape[2], k.shape[2]) if mask.dim() == 3 else mask
        merged = mask if merged is None else merged + mask
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


# By type of module: the attribute that it checks before it passes all weights to one fused operator, which only takes
# floats, and the value that keeps it from doing so.
_SWITCHES: Final[dict[type[nn.Module], tuple[str, object]]] = {
    nn.TransformerEncoder: ("use_nested_tensor", False),
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
}
_AS_IT_WAS: Final = "_pared_switch"


def leave_fast_paths(model: nn.Module) -> None:
    """Let transformer layers call their children if one of these is a counterpart, instead of a fused operator.

    Outputs at padded positions are then those of PyTorch with gradients enabled, not the zeros of its fused operator.
    """
    for module in model.modules():
        for cls, (switch, off) in _SWITCHES.items():
            if isinstance(module, cls) and any(isinstance(child, Counterpart) for child in module.modules()):
                module.__dict__.setdefault(_AS_IT_WAS, getattr(module, switch))
                setattr(module, switch, off)


def rejoin_fast_paths(model: nn.Module) -> None:
    """Undo `leave_fast_paths`."""
    for module in model.modules():
        for cls, (switch, _) in _SWITCHES.items():
            if isinstance(module, cls) and _AS_IT_WAS in module.__dict__:
                setattr(module, switch, module.__dict__.pop(_AS_IT_WAS))
