"""Carries out a decision: encodes a tensor as it says, or a few of its rows to estimate the bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pared.fitting.rounding.nearest import nearest
from pared.fitting.rounding.targets import ceilings, without_empty_slices
from pared.formats.coded import Coded, Float, Raw, dtype_name
from pared.formats.views import View
from pared.model.contents import Decision
from pared.model.tensors import ModelTensor


def encode(model_tensor: ModelTensor, decision: Decision) -> Coded:
    """Encode a tensor as its decision says; a grid without feedback."""
    tensor = model_tensor.tensor.detach()
    if decision.own_grid:
        assert model_tensor.own_grid is not None
        return model_tensor.own_grid
    if decision.treatment == "grid":
        assert decision.bits is not None
        ceiling = ceilings(tensor, model_tensor.view, model_tensor.normed)
        coded = nearest(tensor, decision.bits, model_tensor.view, ceiling)
        codes = without_empty_slices(coded.parts["codes"], tensor, model_tensor.normed)
        return replace(coded, parts={**coded.parts, "codes": codes})
    if decision.treatment == "exact" or decision.treatment == "made":  # mypy narrows only so
        return Raw(dtype_name(tensor.dtype)).encode(tensor)
    return Float(decision.treatment).encode(tensor)


@dataclass(frozen=True)
class SampledCost:
    """The bytes of an encoded tensor, estimated from a few of its rows.

    Args:
        nbytes: the size of the whole tensor.
        sampled: how many of its numbers were rounded.
    """

    nbytes: float
    sampled: int


def sample_cost(model_tensor: ModelTensor, decision: Decision, rows: int) -> SampledCost:
    """Estimate the bytes of an encoded tensor by rounding at most `rows` evenly spaced rows of it."""
    tensor = model_tensor.tensor.detach()
    if decision.treatment != "grid" or tensor.numel() == 0:
        width = {"float16": 2, "float32": 4, "made": 0}.get(decision.treatment, tensor.element_size())
        return SampledCost(tensor.numel() * width, 0)
    assert decision.bits is not None
    view = model_tensor.view
    matrix = view.matrix(tensor)
    chosen = torch.linspace(0, len(matrix) - 1, min(rows, len(matrix))).long()
    sample = matrix[chosen]
    coded = nearest(sample, decision.bits, View(tuple(sample.shape), (0,) if view.rows else ()))
    return SampledCost(coded.nbytes * tensor.numel() / sample.numel(), sample.numel())
