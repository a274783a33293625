"""Sizes that a captured graph has fixed, although they were to vary and the model itself takes others.

`torch.export` decides which sizes may vary: it makes a constant of whatever an operator reads as a number,
such as the length of the sequences of an LSTM. What belongs to the weights is told apart by calling the model.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pared.runtime.graphs.capturing.capture import Example
from pared.runtime.onnx.signature import GraphInput

log = logging.getLogger(__name__)

Place = tuple[int, int]  # a tensor of the call, and a dimension of it

_FIXED: Final = (
    "%s takes %s only with %d in dimension %d, where the model itself takes other sizes: the capture fixed it, as it "
    "does for the length of sequences in LSTM and GRU; export a file for each size, or pad to one"
)


def asked_dimensions(shape: Any) -> set[int]:
    """The dimensions of a tensor that are to vary, by its entry of `dynamic_shapes`.

    >>> asked_dimensions({0: torch.export.Dim("rows"), 1: None}), asked_dimensions((None, 3)), asked_dimensions(None)
    ({0}, set(), set())
    """
    if shape is None:
        return set()
    pairs = shape.items() if isinstance(shape, Mapping) else enumerate(shape)
    return {at for at, size in pairs if not (size is None or size is torch.export.Dim.STATIC or isinstance(size, int))}


def tell_fixed(
    path: Path, model: nn.Module, call: Example, inputs: Mapping[str, GraphInput], asked: Sequence[object]
) -> None:
    """Warn of each size that a graph has fixed and the model has not, and of inputs that cannot vary at all.

    Args:
        path: the file of the graph.
        model: the float model, which is called with other sizes.
        call: the example.
        inputs: those of the graph, in the order of the call's tensors.
        asked: for each of them its entry of `dynamic_shapes`.
    """
    names, fixed = list(inputs), []
    for i, (one, shape) in enumerate(zip(inputs.values(), asked, strict=True)):
        wanted = asked_dimensions(shape)
        fixed += [(i, at) for at, size in enumerate(one.shape) if at in wanted and isinstance(size, int)]
    free = _free_in(model, call, fixed)
    for i, dimension in sorted(free):
        log.warning(_FIXED, path.name, names[i], inputs[names[i]].example[dimension], dimension)
    told = {i for i, _ in free}
    for i, one in enumerate(inputs.values()):
        if one.shape and i not in told and all((i, at) in fixed for at in range(len(one.shape))):
            log.warning("the model fixes the shape of %s: %s", names[i], list(one.shape))


def _free_in(model: nn.Module, call: Example, places: Collection[Place]) -> set[Place]:
    """Those of the places at which the model takes one more.

    Sizes that are equal may have to change together, such as that of a sequence and of its mask: all of one size are
    tried first, then those in the same dimension, then each alone.
    """
    leaves, structure = tree_flatten(call)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    found: set[Place] = set()
    for together in range(3):
        groups: defaultdict[object, set[Place]] = defaultdict(set)
        for i, dimension in set(places) - found:
            size = leaves[at[i]].shape[dimension]
            if size:  # nothing can be repeated of what is empty
                groups[(size, dimension, i)[: together + 1]].add((i, dimension))
        for group in groups.values():
            grown = list(leaves)
            for i, dimension in group:
                grown[at[i]] = _grown(grown[at[i]], dimension)
            if _runs(model, tree_unflatten(grown, structure)):
                found |= group
    return found


def _grown(tensor: Tensor, dimension: int) -> Tensor:
    """A tensor with its last slice twice."""
    return torch.cat([tensor, tensor.narrow(dimension, tensor.shape[dimension] - 1, 1)], dimension)


def _runs(model: nn.Module, call: Example) -> bool:
    try:
        with torch.no_grad():
            model(*call[0], **call[1])
    except Exception:  # noqa: BLE001  # whatever a model makes of a size that it does not take
        return False
    return True
