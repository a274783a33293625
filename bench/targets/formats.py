"""Weights put into one format of a runtime: to the nearest, and solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from pared import PostTrainingQuantConfig
from pared.fitting.preparation import Prepared, prepare
from pared.fitting.rounding.groups.solve import solve_in_groups
from pared.fitting.rounding.importance import make_target
from pared.fitting.rounding.targets import RoundingTarget
from pared.fitting.search.compressor import Compressor
from pared.formats.groups.grid import GroupGrid, representable
from pared.formats.groups.search import fitted, nearest
from pared.model.calls import Calibration
from pared.model.tensors import ModelTensor
from pared.runtime.record import contents_of
from pared.targets.table import TARGETS
from pared.targets.target import Offer
from pared.terminal import Stages

Weights = Mapping[str, Tensor]


def prepared(model: nn.Module, calibration: Calibration, target: str, samples: int) -> Prepared[nn.Module]:
    """What `fit` knows before it rounds."""
    conf = PostTrainingQuantConfig(target=target, calibration_sampling_size=samples)
    return prepare(model, conf, calibration, (None, None), Stages(quiet=True))


def offer_of(target: str, name: str) -> Offer:
    return next(offer for offer in TARGETS[target].offers if offer.name == name)


def linear(known: Prepared[nn.Module]) -> list[ModelTensor]:
    """The weights of linear layers that are tied to nothing."""
    return [one for one in known.tensors if isinstance(one.module, nn.Linear) and one.tensor.dim() == 2]


def bytes_of(tensors: list[ModelTensor], offer: Offer) -> int:
    return sum(offer.nbytes(one.view.n_rows, one.view.n_columns) for one in tensors)


def targets_of(known: Prepared[nn.Module]) -> Mapping[str, RoundingTarget]:
    """What is needed to round the linear weights, in whatever format."""
    assert known.sensitivity is not None
    found = {}
    for one in linear(known):
        matrix = one.view.matrix(one.tensor.detach().float()).contiguous()
        target = make_target(matrix, one.view, known.sensitivity.tensors[one.name])
        found[one.name] = replace(target, judged=None)
    return found


def solved(known: Prepared[nn.Module], targets: Mapping[str, RoundingTarget], offer: Offer) -> Weights:
    """The linear weights in one format; all others as they are."""
    assert isinstance(offer.grid, GroupGrid)
    found = {one.name: one.tensor.detach() for one in known.tensors}
    for name, target in targets.items():
        parts = solve_in_groups(target, offer.grid, negative=offer.negative)
        found[name] = torch.from_numpy(offer.grid.decode(parts))
    return found


def rounded(model: nn.Module, wanted: Callable[[str, Tensor], Offer | None]) -> Weights:
    """Weights to the nearest, with steps by the largest magnitude of each group, as converters do it.

    Nested steps are searched, which is what llama.cpp does.

    Args:
        model: the float model.
        wanted: the format of a tensor; None leaves it as it is.
    """
    found = {}
    for name, tensor in model.state_dict().items():
        offer = wanted(name, tensor)
        found[name] = tensor if offer is None else _nearest(tensor, offer)
    return found


def _nearest(tensor: Tensor, offer: Offer) -> Tensor:
    grid = offer.grid
    assert isinstance(grid, GroupGrid)
    matrix = tensor.float().numpy()
    if grid.nested:
        parts = fitted(matrix, grid, negative=offer.negative)
        return torch.from_numpy(grid.decode({"codes": nearest(matrix, grid, parts), **parts}))
    rows, columns = matrix.shape
    size = grid.group or columns
    filled = np.pad(matrix, ((0, 0), (0, -columns % size))).reshape(rows, -1, size)
    low, high = filled.min(2), filled.max(2)
    # Q4_0 of llama.cpp puts the number that is farthest from 0 on the end of the long side.
    far = np.where(high > -low, high, low) if offer.negative else -np.maximum(high, -low)
    parts = {"step": representable(np.asarray(far / grid.low, np.float32), grid.step)}
    return torch.from_numpy(grid.decode({"codes": nearest(matrix, grid, parts), **parts}))


def within(known: Prepared[nn.Module], nbytes: int) -> tuple[Weights, int, dict[str, int]]:
    """The model of least damage of at most a size: its weights, its bytes, and how many weights have each format."""
    compressor = Compressor(known.tensors, known.conf, known.seen, known.sensitivity)
    point = compressor.within_bytes(nbytes, 0)
    contents = contents_of(compressor.build(point))
    counts: dict[str, int] = {}
    for stored in contents.tensors:
        if stored.decision.treatment == "grid":
            kind = stored.decision.because.partition(";")[0]
            counts[kind] = counts.get(kind, 0) + stored.coded.parts["codes"].numel()
    return {one.name: one.coded.decode() for one in contents.tensors}, point.nbytes, counts
