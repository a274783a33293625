"""A tensor seen as a matrix: which dimensions are rows (one step each), which are columns, and the way back."""

from __future__ import annotations

import functools
import math
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from pared.formats.entropy import Codes

if TYPE_CHECKING:  # files are compressed without torch
    from torch import Tensor, nn

ArrayT = TypeVar("ArrayT", bound=Any)  # a tensor of torch or an array of NumPy


@dataclass(frozen=True)
class View:
    """A tensor as rows and columns, without moving any of its numbers.

    Args:
        split: the tensor's shape, where needed with one dimension split in two (groups); same number of elements.
        rows: the dimensions of `split` that count rows, ascending; all others count columns. `()` is a single row.

    >>> import torch
    >>> view = View(split=(2, 3), rows=(1,))
    >>> view.row_sizes, view.n_rows
    ((3,), 3)
    >>> view.matrix(torch.arange(6).reshape(2, 3)).tolist()
    [[0, 3], [1, 4], [2, 5]]
    >>> view.spread(torch.tensor([1.0, 10.0, 100.0])).shape
    torch.Size([1, 3])
    """

    split: tuple[int, ...]
    rows: tuple[int, ...]

    @functools.cached_property
    def row_sizes(self) -> tuple[int, ...]:
        """The sizes of the row dimensions: the shape of one number per row."""
        return tuple(self.split[i] for i in self.rows)

    @functools.cached_property
    def n_rows(self) -> int:
        """How many rows there are."""
        return math.prod(self.row_sizes)

    @functools.cached_property
    def n_columns(self) -> int:
        """How many columns there are."""
        return math.prod(self.split[i] for i in self.columns)

    @functools.cached_property
    def columns(self) -> tuple[int, ...]:
        """The dimensions of `split` that count columns."""
        return tuple(i for i in range(len(self.split)) if i not in self.rows)

    @functools.cached_property
    def across(self) -> View:
        """The same tensor with rows and columns exchanged."""
        return View(self.split, self.columns)

    def spread(self, per_row: ArrayT) -> ArrayT:
        """One number per row (a tensor or array of shape `row_sizes`), shaped to broadcast against `split`."""
        shaped: ArrayT = per_row.reshape([n if i in self.rows else 1 for i, n in enumerate(self.split)])
        return shaped

    def matrix(self, tensor: Tensor) -> Tensor:
        """The tensor as a matrix of `n_rows` rows (a copy where the dimensions have to move)."""
        if self.rows == tuple(range(len(self.rows))):
            return tensor.reshape(self.n_rows, self.n_columns)
        return tensor.reshape(self.split).permute(*self.rows, *self.columns).reshape(self.n_rows, self.n_columns)

    def restore(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `matrix`: the tensor of `shape` that has these rows."""
        if self.rows == tuple(range(len(self.rows))):
            return matrix.reshape(shape)
        order = (*self.rows, *self.columns)
        back = [order.index(i) for i in range(len(order))]
        return matrix.reshape([self.split[i] for i in order]).permute(back).reshape(shape)


def first_dimension(shape: tuple[int, ...]) -> View:
    """Rows are dimension 0, as in Linear, Conv, Embedding and the gates of LSTM and GRU; a single number is one row."""
    return View(shape, (0,) if shape else ())


def single_row(shape: tuple[int, ...]) -> View:
    """One step for the whole tensor."""
    return View(shape, ())


def _transposed_convolution(module: nn.Module, shape: tuple[int, ...]) -> View:
    """ConvTranspose stores (in, out / groups, ...): an output channel is a (group, column) pair."""
    groups = module.groups
    if not isinstance(groups, int) or groups == 1:
        return View(shape, (1,))
    return View((groups, shape[0] // groups, *shape[1:]), (0, 2))


# Classes whose `weight` does not have its output channels in dimension 0. By qualified name, so that
# packages that may not be installed need not be imported; subclasses count as their base.
VIEWS: Final[dict[str, Callable[[nn.Module, tuple[int, ...]], View]]] = {
    "torch.nn.modules.conv._ConvTransposeNd": _transposed_convolution,
    "transformers.pytorch_utils.Conv1D": lambda _, shape: View(shape, (1,)),
}

# The dimensions that are rows in users' own layers, by class and attribute: `pared.register` fills it. A class that
# nothing else uses is forgotten.
OWN_ROWS: Final[weakref.WeakKeyDictionary[type, Mapping[str, tuple[int, ...]]]] = weakref.WeakKeyDictionary()

# A step takes four bytes: rows shorter than this would spend more on steps than on int8 codes.
_SHORTEST_ROW: Final = 4

# A tensor of three dimensions is taken for a stack of matrices, such as the experts of a layer, if its name says so, or
# if the matrices are too large for the kernels of a convolution. If that is wrong, it costs a few steps too many.
_EXPERTS: Final = re.compile(r"(?i)expert|moe")
_CONVOLUTION: Final = re.compile(r"(?i)conv")
_SMALLEST_MATRIX: Final = 32
_SMALLEST_EXPERT: Final = 8


def view_of(module: nn.Module, attribute: str, shape: tuple[int, ...]) -> View:
    """The view of one tensor of a module.

    Args:
        module: the module that owns the tensor.
        attribute: the tensor's name within the module; only `weight` may differ from the default.
        shape: the tensor's shape.

    >>> from torch import nn
    >>> view_of(nn.ConvTranspose2d(4, 6, 3, groups=2), "weight", (4, 3, 3, 3)).row_sizes
    (2, 3)
    """
    own = next((OWN_ROWS[cls] for cls in type(module).__mro__ if attribute in OWN_ROWS.get(cls, {})), None)
    if own is not None:
        return View(shape, own[attribute])
    if not is_own(module, attribute):
        return plain_view(shape, f"{type(module).__qualname__}.{attribute}")
    view = first_dimension(shape)
    if attribute == "weight":
        for cls in type(module).__mro__:
            special = VIEWS.get(f"{cls.__module__}.{cls.__qualname__}")
            if special is not None:
                view = special(module, shape)
    return long_enough(view, shape)


def is_own(module: nn.Module, attribute: str) -> bool:
    """Whether the module's class says what the dimensions of this tensor mean: PyTorch's, registered, or in `VIEWS`."""
    weight = attribute.startswith("weight")  # what a subclass adds to a layer has other names
    for cls in type(module).__mro__:
        if attribute in OWN_ROWS.get(cls, {}) or cls.__module__.startswith("torch.nn.utils."):
            return True
        if weight and (f"{cls.__module__}.{cls.__qualname__}" in VIEWS or _is_layer(cls)):
            return True
    return False


def _is_layer(cls: type) -> bool:
    """Whether a class is one of PyTorch's layers: not the base of all modules, and no container of a user's tensors."""
    room = cls.__module__
    return room.startswith("torch.nn.") and room not in ("torch.nn.modules.module", "torch.nn.modules.container")


def plain_view(shape: tuple[int, ...], name: str = "") -> View:
    """The view of a tensor of which nothing but the shape and the name is known.

    >>> plain_view((8, 3, 3)).rows, plain_view((8, 64, 64)).rows, plain_view((8, 64, 64), "conv.weight").rows
    ((0,), (0, 1), (0,))
    """
    view = View(shape, tuple(range(len(shape) - 1))) if _is_stack(shape, name) else first_dimension(shape)
    return long_enough(view, shape)


def _is_stack(shape: tuple[int, ...], name: str) -> bool:
    if len(shape) < 3 or shape[0] < 2 or _CONVOLUTION.search(name):
        return False
    if _EXPERTS.search(name):
        return min(shape[-2:]) >= _SMALLEST_EXPERT
    return len(shape) == 3 and min(shape[-2:]) >= _SMALLEST_MATRIX


def long_enough(view: View, shape: tuple[int, ...]) -> View:
    """The view, or a single row where its rows would be so short that their steps take more bytes than their codes."""
    return view if math.prod(shape) >= view.n_rows * _SHORTEST_ROW else single_row(shape)


def matrix_of(codes: Codes, view: View) -> Codes:
    """`View.matrix`, of an array."""
    return codes.reshape(view.split).transpose(*view.rows, *view.columns).reshape(view.n_rows, view.n_columns)


def restored(matrix: Codes, shape: tuple[int, ...], view: View) -> Codes:
    """`View.restore`, of an array."""
    order = (*view.rows, *view.columns)
    moved = matrix.reshape([view.split[i] for i in order]).transpose(np.argsort(order))
    return np.ascontiguousarray(moved).reshape(shape)
