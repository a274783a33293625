"""Contents with weights on grids with groups, as a fit for a runtime would make them, by nearest rounding."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pared.formats.coded import Grouped, Raw, dtype_name
from pared.formats.groups.grid import GroupGrid
from pared.formats.views import View
from pared.model.contents import Contents, Decision, Stored
from pared.model.tensors import find_tensors


def contents_with(
    model: nn.Module, grids: Mapping[str, GroupGrid], rows: Mapping[str, tuple[int, ...]] | None = None
) -> Contents:
    """The contents of a model in which tensors of these names are on grids, and all others stay exact.

    Args:
        model: a float model in eval mode.
        grids: by the name of a tensor its grid; "*" stands for all other matrices.
        rows: by the name of a tensor the dimensions that are its rows; default: the first.
    """
    tensors = []
    for one in find_tensors(model):
        grid = grids.get(one.name, grids.get("*") if one.tensor.dim() == 2 and one.tensor.is_floating_point() else None)
        exact = Raw(dtype_name(one.tensor.dtype))
        view = View(tuple(one.tensor.shape), (rows or {}).get(one.name, (0,)))
        coded = exact.encode(one.tensor) if grid is None else Grouped(grid).encode(one.tensor, view=view)
        tensors.append(Stored(one.names, one.kind, coded, Decision(one.name, "grid", None, "")))
    return Contents(tuple(tensors))
