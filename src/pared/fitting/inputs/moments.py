"""The second moments of what linear layers get, from one more run of the recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce

import torch
from torch import Tensor, nn

from pared.fitting.calibration.blocks import add_up, blocks_of
from pared.fitting.calibration.sensitivity import Sensitivity
from pared.fitting.calibration.watch import Product, ProductWatch
from pared.model.calls import Call
from pared.model.copies import shadow
from pared.model.tensors import ModelTensors


class InputMoments:
    """Sums `x x^T` over all calls. Weights that always have the same input share one sum.

    Args:
        tensors: those of the model.
    """

    def __init__(self, tensors: ModelTensors[nn.Module]) -> None:
        layouts = {tensor.name: blocks_of(tensor) for tensor in tensors if tensor.weight_like}
        self._whole = {name for name, layout in layouts.items() if layout.groups == layout.column_blocks == 1}
        self._sums: dict[tuple[str, ...], Tensor] = {}  # by the weights that had these inputs in common
        self._last: tuple[Tensor, tuple[str, ...]] | None = None  # the last input, and those that have had it so far

    def tell(self, product: Product) -> None:
        """Add the input of a product."""
        if product.kind != "linear" or product.tensor not in self._whole or not product.x.is_floating_point():
            return
        names: tuple[str, ...] = ()
        if self._last is not None and self._last[0] is product.x and product.tensor not in self._last[1]:
            names = self._last[1]
        else:
            self._add()
        self._last = product.x, (*names, product.tensor)

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums by the weight's first name, float32 (columns, columns)."""
        self._add()
        own: dict[str, list[tuple[str, ...]]] = {}
        for group in self._sums:
            for name in group:
                own.setdefault(name, []).append(group)
        totals = {groups: reduce(torch.add, map(self._sums.__getitem__, groups)) for groups in map(tuple, own.values())}
        return {name: totals[tuple(groups)] for name, groups in own.items()}

    def _add(self) -> None:
        """Add the last input to the sum of those that had it."""
        if self._last is not None:
            x, group = self._last
            rows = x.reshape(-1, x.shape[-1]).float()
            add_up(self._sums, group, rows.T @ rows)
            self._last = None


def finite(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that are finite."""
    return {name: one for name, one in moments.items() if bool(one.isfinite().all())}


def added(moments: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of moments by name; what weights share, they still share.

    >>> x = torch.ones(1, 1)
    >>> found = added({"a": x, "b": x}, {"a": x, "c": x})
    >>> [(name, float(one)) for name, one in found.items()]
    [('a', 2.0), ('b', 1.0), ('c', 1.0)]
    """
    found, made = dict(moments), dict[tuple[int, int], Tensor]()
    for name, value in more.items():
        known = moments.get(name)
        if known is None:
            found[name] = value
            continue
        key = id(known), id(value)
        if key not in made:
            made[key] = known + value
        found[name] = made[key]
    return found


def here(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in the memory of the CPU; what weights share, they still share."""
    made = {id(one): one.cpu() for one in moments.values()}
    return {name: made[id(one)] for name, one in moments.items()}


def moments_of(tensors: ModelTensors[nn.Module], runs: Iterable[Callable[[], object]]) -> dict[str, Tensor]:
    """The sums of functions that use the tensors."""
    sums = InputMoments(tensors)
    with torch.no_grad():
        for run in runs:
            with ProductWatch(tensors.names, sums.tell):
                run()
    return sums.sums


def input_moments(tensors: ModelTensors[nn.Module], calls: Sequence[Call]) -> dict[str, Tensor]:
    """The second moments of the inputs of weights, by the weights' names.

    Args:
        tensors: those of the model, which is left as it is.
        calls: the calls of calibration, which are repeated.
    """
    copied = tensors.in_copy(shadow(tensors.model))
    return finite(moments_of(copied, (partial(call.on, copied.model) for call in calls)))


def with_inputs(sensitivity: Sensitivity, moments: Mapping[str, Tensor]) -> Sensitivity:
    """What errors cost, together with the moments of the inputs of weights that have moments of gradients."""
    tensors = {
        name: replace(stats, inputs=moments[name][None])
        if name in moments and stats.moments is not None and stats.moments.shape[1:] == moments[name].shape
        else stats
        for name, stats in sensitivity.tensors.items()
    }
    return replace(sensitivity, tensors=tensors)
