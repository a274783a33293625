"""Arguments and results of a module in another floating type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map


def cast_floats(values: Any, dtype: torch.dtype) -> Any:
    """The same values, with floating tensors and packed sequences in another type."""
    if type(values) is Tensor:  # most calls: taking values apart takes longer than a small product
        return values.to(dtype) if values.is_floating_point() else values

    def cast(value: Any) -> Any:
        floats = isinstance(value, (Tensor, PackedSequence)) and value.data.is_floating_point()
        return value.to(dtype) if floats else value

    return tree_map(cast, values)


def first_dtype(values: Any, otherwise: torch.dtype) -> torch.dtype:
    """The type of the first floating tensor or packed sequence among the values; `otherwise` if there is none.

    >>> first_dtype((torch.arange(2), {"x": torch.zeros(2)}), torch.float16)
    torch.float32
    """
    tensors = (leaf.data for leaf in tree_leaves(values) if isinstance(leaf, (Tensor, PackedSequence)))
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), otherwise)
