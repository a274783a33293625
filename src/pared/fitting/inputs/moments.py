"""The second moments of what linear layers get, from one more run of the recorded calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pared.fitting.calibration.blocks import add_up, blocks_of
from pared.fitting.calibration.sensitivity import Sensitivity
from pared.fitting.calibration.watch import Product, ProductWatch
from pared.model.calls import Call
from pared.model.copies import shadow
from pared.model.tensors import ModelTensors


class InputMoments:
    """Sums `x x^T` over all calls. Weights with the same input share one sum.

    Args:
        tensors: those of the model.
    """

    def __init__(self, tensors: ModelTensors[nn.Module]) -> None:
        layouts = {tensor.name: blocks_of(tensor) for tensor in tensors if tensor.weight_like}
        self._whole = {name for name, layout in layouts.items() if layout.groups == layout.column_blocks == 1}
        self._leaders: dict[str, str] = {}  # the weight whose sum a weight shares
        self._sums: dict[str, Tensor] = {}
        self._last: tuple[Tensor, str] | None = None  # the last input, and whose sum it went into

    def tell(self, product: Product) -> None:
        """Add the input of a product."""
        if product.kind != "linear" or product.tensor not in self._whole or not product.x.is_floating_point():
            return
        name = product.tensor
        shared = self._last is not None and self._last[0] is product.x
        leader = self._leaders.setdefault(name, self._last[1] if shared and self._last is not None else name)
        if shared and self._last is not None and self._last[1] == leader:
            return
        x = product.x.reshape(-1, product.x.shape[-1]).float()
        add_up(self._sums, leader, x.T @ x)
        self._last = product.x, leader

    def result(self) -> dict[str, Tensor]:
        """The moments by the weight's first name, float32 (columns, columns)."""
        return {
            name: self._sums[leader]
            for name, leader in self._leaders.items()
            if bool(self._sums[leader].isfinite().all())
        }


def input_moments(tensors: ModelTensors[nn.Module], calls: Sequence[Call]) -> dict[str, Tensor]:
    """The second moments of the inputs of weights, by the weights' names.

    Args:
        tensors: those of the model, which is left as it is.
        calls: the calls of calibration, which are repeated.
    """
    copied = tensors.in_copy(shadow(tensors.model))
    sums = InputMoments(copied)
    with torch.no_grad():
        for call in calls:
            with ProductWatch(copied.names, sums.tell):
                call.on(copied.model)
    return sums.result()


def with_inputs(sensitivity: Sensitivity, moments: Mapping[str, Tensor]) -> Sensitivity:
    """What errors cost, together with the moments of the inputs of weights that have moments of gradients."""
    tensors = {
        name: replace(stats, inputs=moments[name][None])
        if name in moments and stats.moments is not None and stats.moments.shape[1:] == moments[name].shape
        else stats
        for name, stats in sensitivity.tensors.items()
    }
    return replace(sensitivity, tensors=tensors)
