"""Quantized models whose formats a test chooses, made without a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pared.formats.coded import Coded, Grid, Grouped, Raw, dtype_name
from pared.model.contents import Contents, Decision, Stored
from pared.model.tensors import ModelTensor, find_tensors
from pared.runtime import quantized
from pared.runtime.profile.profile import Profile, this_machine
from pared.targets.target import Target


def quantized_as(model: Any, choose: Callable[[ModelTensor], Coded]) -> Any:
    """A quantized model in which each tensor is what a function says."""
    tensors = find_tensors(model)
    stored = [Stored(one.names, one.kind, choose(one), Decision(one.name, "grid", 8, "")) for one in tensors]
    return quantized.assemble(tensors, Contents(tuple(stored), provenance={"seed": 0}), Profile(this_machine()))


def kept(tensor: ModelTensor) -> Coded:
    return Raw(dtype_name(tensor.tensor.dtype)).encode(tensor.tensor)


def in_format(target: Target, name: str) -> Callable[[ModelTensor], Coded]:
    """All matrices in a format of a runtime."""
    offer = next(offer for offer in target.offers if offer.name == name)
    assert not isinstance(offer.grid, str)
    grid = Grouped(offer.grid)
    return lambda one: grid.encode(one.tensor, view=one.view) if one.tensor.dim() == 2 else kept(one)


def in_rows(bits: int, rounded: bool = True) -> Callable[[ModelTensor], Coded]:
    """All matrices with a step for each row, which float16 holds or not."""

    def choose(one: ModelTensor) -> Coded:
        if one.tensor.dim() < 2:
            return kept(one)
        matrix = one.view.matrix(one.tensor.detach())
        step = matrix.abs().amax(1) / ((1 << (bits - 1)) - 1)
        if rounded:
            step = torch.from_numpy(step.numpy().astype(np.float16).astype(np.float32) * np.float32(1 + 2**-9))
            step = torch.from_numpy(step.numpy().astype(np.float16).astype(np.float32))
        return Grid("int8").encode(one.tensor, step.reshape(one.view.row_sizes), one.view)

    return choose
