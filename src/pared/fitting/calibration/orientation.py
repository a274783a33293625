"""Which dimensions of a weight are output channels, learnt from the products that it is seen in.

A parameter of three or more dimensions may be a stack of matrices, such as the experts of a layer, or the projections
of attention heads; nothing about it says which dimension a product sums over. So a few recorded calls are run again,
and each matrix product is looked at: an operand that is a view of a weight has the weight's own strides, which tell
the dimensions that the product sums over. All others are rows, with one step each.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pared.formats.views import View, is_own, long_enough
from pared.model.calls import Call
from pared.model.copies import shadow
from pared.model.tensors import ModelTensor, ModelTensors, ModuleT
from pared.switches import WITHOUT_FAST_PATHS

log = logging.getLogger(__name__)

_MOST_CALLS: Final = 4  # that are run until every weight has been seen in a product

# The position of the left matrix among the arguments; the right one follows. The left one is summed over along its last
# dimension, the right one along its last but one.
PRODUCTS: Final[Mapping[str, int]] = {
    "aten::mm": 0,
    "aten::addmm": 1,
    "aten::bmm": 0,
    "aten::baddbmm": 1,
    "aten::mv": 0,
    "aten::addmv": 1,
    "aten::_grouped_mm": 0,
    "transformers::grouped_mm_fallback": 0,
}
_CONVOLUTION: Final = "aten::convolution"
# What computes the same weight elsewhere in memory, scaled or picked from.
_COPIES: Final = ("aten::clone", "aten::_to_copy", "aten::mul", "aten::div", "aten::index", "aten::index_select")


@dataclass(frozen=True)
class _Axis:
    """A dimension of a weight, or of a copy of some of it. `origin` is None where an index picked."""

    stride: int
    size: int
    origin: int | None


@dataclass(frozen=True)
class _Layout:
    name: str
    axes: tuple[_Axis, ...]

    def origins(self, stride: int, size: int) -> set[int]:
        """The weight's dimensions along which an operand runs that has this dimension."""
        return {
            axis.origin
            for axis in self.axes
            if axis.origin is not None
            and (axis.stride <= stride < axis.stride * axis.size or stride <= axis.stride < stride * size)
        }


def oriented(tensors: ModelTensors[ModuleT], calls: Sequence[Call]) -> ModelTensors[ModuleT]:
    """The same tensors, where the view of each stack of matrices follows the products that it is seen in.

    Layers of PyTorch, those whose rows are in a table or registered, and what no product uses keep their views.

    Args:
        tensors: those of the model, which is left as it is.
        calls: the calls of calibration; the first few are repeated.
    """
    if not any(map(_may_be_stack, tensors)):
        return tensors
    copied = tensors.in_copy(shadow(tensors.model))
    seen = oriented_by(copied, (partial(call.on, copied.model) for call in calls))
    pairs = zip(tensors, seen, strict=True)
    return replace(tensors, tensors=tuple(replace(one, view=own.view, groups=own.groups) for one, own in pairs))


def oriented_by(tensors: ModelTensors[ModuleT], runs: Iterable[Callable[[], object]]) -> ModelTensors[ModuleT]:
    """`oriented`, by functions that run the very tensors, or a part of their model; the first few are called."""
    unknown = {tensor.name for tensor in tensors if _may_be_stack(tensor)}
    if not unknown:
        return tensors
    watch = _Watch(tensors, unknown)
    with torch.no_grad(), WITHOUT_FAST_PATHS:
        for run in islice(runs, _MOST_CALLS):
            with watch:
                run()
            if unknown <= watch.summed.keys():
                break
    found = [
        _seen_as(tensor, watch.summed[tensor.name]) if tensor.name in watch.summed else tensor for tensor in tensors
    ]
    return replace(tensors, tensors=tuple(found))


def _may_be_stack(tensor: ModelTensor) -> bool:
    return tensor.weight_like and tensor.tensor.dim() > 2 and not is_own(tensor.module, tensor.attribute)


def _seen_as(tensor: ModelTensor, votes: Counter[tuple[frozenset[int], frozenset[int]]]) -> ModelTensor:
    """The tensor with the view and the groups of the products in which it was seen most often."""
    summed, free = votes.most_common(1)[0][0]
    shape = tuple(tensor.tensor.shape)
    rows = tuple(i for i in range(len(shape)) if i not in summed)
    view = long_enough(View(shape, rows), shape)
    apart = [i for i in view.rows if i not in free]  # a matrix each, with inputs of its own
    # Groups are runs of rows, so only dimensions before all others can count them.
    groups = math.prod(shape[i] for i in apart) if tuple(apart) == view.rows[: len(apart)] else 1
    return replace(tensor, view=view, groups=groups)


class _Watch(TorchDispatchMode):
    """While it is entered, notes along which dimensions products sum over weights.

    Attributes:
        summed: by the weight's name, how often a product summed over some of its dimensions while its output ran along
            others.
    """

    def __init__(self, tensors: ModelTensors[nn.Module], unknown: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.summed: dict[str, Counter[tuple[frozenset[int], frozenset[int]]]] = {}
        self._known = {_place(tensor.tensor) for tensor in tensors}
        self._layouts: dict[StorageWeakRef, _Layout] = {}
        for tensor in tensors:
            if tensor.name in unknown:
                value = tensor.tensor
                sizes = zip(value.stride(), value.shape, range(value.dim()), strict=True)
                self._layouts[_place(value)] = _Layout(tensor.name, tuple(_Axis(*axis) for axis in sizes))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator; look at it if it is a product, or if it copies a weight."""
        found = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in PRODUCTS:
            self._product(*args[PRODUCTS[name] : PRODUCTS[name] + 2])
        elif name == _CONVOLUTION:
            self._convolution(args[1], transposed=args[6], groups=args[8])
        elif name in _COPIES:
            self._copy(name, args, found)
        return found

    def _layout(self, tensor: object) -> _Layout | None:
        return self._layouts.get(_place(tensor)) if _is_plain(tensor) else None

    def _product(self, left: Tensor, right: Tensor) -> None:
        for operand, other, summed in ((left, right, -1), (right, left, -2 if right.dim() > 1 else -1)):
            layout = self._layout(operand)
            # Tokens that are parameters, times the weights of a layer, are its input.
            if layout is None or (_is_plain(other) and _place(other) in self._known and not self._layout(other)):
                continue
            if operand.shape[summed] < 2:
                continue
            free = {-1, -2} - {summed} if operand.dim() > 1 else set[int]()
            self._vote(layout, operand, {summed}, free)

    def _vote(self, layout: _Layout, operand: Tensor, summed: set[int], free: set[int]) -> None:
        along, across = (
            frozenset().union(
                *(layout.origins(operand.stride(i), operand.shape[i]) for i in which if operand.shape[i] > 1)
            )
            for which in (summed, free)
        )
        if along - across:
            self.summed.setdefault(layout.name, Counter())[along - across, across] += 1

    def _convolution(self, weight: Tensor, *, transposed: bool, groups: int) -> None:
        layout = self._layout(weight)
        if layout is None or (transposed and groups > 1):
            return
        rows = 1 if transposed else 0
        self._vote(layout, weight, set(range(weight.dim())) - {rows}, {rows})

    def _copy(self, name: str, args: Sequence[Any], found: Tensor) -> None:
        """Note where the dimensions of a weight are in what was computed from it, if they are still told apart."""
        source = next((arg for arg in args[:2] if self._layout(arg)), None)
        layout = self._layout(source)
        if source is None or layout is None or not _is_plain(found) or self._layout(found):
            return
        others = [arg for arg in args[:2] if isinstance(arg, Tensor) and arg is not source]
        if any(other.numel() >= source.numel() and _place(other) not in self._known for other in others):
            return  # an input that the weight scales
        origins = [layout.origins(source.stride(i), n) if n > 1 else set() for i, n in enumerate(source.shape)]
        picked = _picked(name, args, source)
        if picked is not None:  # the dimensions of the index take the place of the one that it picks from
            dimension, count = picked
            origins = [*origins[:dimension], *([set()] * count), *origins[dimension + 1 :]]
        elif found.shape != source.shape:
            return
        if len(origins) != found.dim() or any(len(origin) > 1 for origin in origins):
            return
        axes = zip(found.stride(), found.shape, origins, strict=True)
        self._layouts[_place(found)] = _Layout(
            layout.name, tuple(_Axis(stride, size, next(iter(origin), None)) for stride, size, origin in axes)
        )


def _picked(name: str, args: Sequence[Any], source: Tensor) -> tuple[int, int] | None:
    """The dimension of a weight that an indexing operator picks from, and how many dimensions its index has."""
    if name == "aten::index_select":
        return args[1] % source.dim(), 1
    if name == "aten::index":
        places = [(i, index) for i, index in enumerate(args[1]) if index is not None]
        if len(places) == 1 and places[0][1].dtype in (torch.int64, torch.int32):
            return places[0][0], places[0][1].dim()
    return None


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided


def _place(tensor: Any) -> StorageWeakRef:
    """The memory that a tensor is in; it tells views of one tensor from all others."""
    return StorageWeakRef(tensor.untyped_storage())
