"""Grids with groups decoded by torch: graphs are captured, and functions transformed, through here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pared.formats.groups.grid import GroupGrid


def decoded(grid: GroupGrid, codes: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """What `GroupGrid.decode` gives, float32 (rows, columns).

    Args:
        grid: the grid.
        codes: (rows, columns).
        parts: all others; "codes" among them is not read.

    >>> parts = {"step": torch.tensor([[0.5, 0.25]])}
    >>> decoded(GroupGrid(4, 2), torch.tensor([[1, -2, 3]], dtype=torch.int8), parts).tolist()
    [[0.5, -1.0, 0.75]]
    """
    rows, columns = codes.shape
    group = min(grid.group or columns, columns) or 1
    whole = columns % group == 0

    def spread(values: Tensor) -> Tensor:
        return values.unsqueeze(2) if whole else values.repeat_interleave(group, 1)[:, :columns]

    values = codes.reshape(rows, columns // group, group) if whole else codes
    values = values.to(torch.float32)  # mixed types are slower
    step = _of_groups(grid, parts, "step", "multiple")
    if grid.zero == "code":
        values = (values - spread(parts["zero"])) * spread(step)
    elif grid.zero == "least":
        values = (values - grid.low) * spread(step) + spread(_of_groups(grid, parts, "least", "least multiple"))
    else:
        values = values * spread(step)
    return values.reshape(rows, columns)


def _of_groups(grid: GroupGrid, parts: Mapping[str, Tensor], name: str, multiple: str) -> Tensor:
    """Steps or least values, one for each group."""
    if not grid.nested:
        return parts[name]
    groups = parts[multiple].shape[1]
    return parts[name].repeat_interleave(min(grid.nested, groups), 1)[:, :groups] * parts[multiple].to(torch.float32)
