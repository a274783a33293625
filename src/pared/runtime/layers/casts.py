"""Arguments and results of a module in another floating type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map


def cast_floats(values: Any, dtype: torch.dtype) -> Any:
    """The same with its floats in another type."""

    def one(value: Any) -> Any:
        floats = isinstance(value, (Tensor, PackedSequence)) and value.data.is_floating_point()
        return value.to(dtype) if floats else value

    return tree_map(one, values)


def first_dtype(values: Any, otherwise: torch.dtype) -> torch.dtype:
    """The type of the first floats among them.

    >>> first_dtype((torch.arange(2), {"x": torch.zeros(2)}), torch.float16)
    torch.float32
    """
    found = (one.data for one in tree_leaves(values) if isinstance(one, (Tensor, PackedSequence)))
    return next((one.dtype for one in found if one.is_floating_point()), otherwise)
