"""Where weights meet their inputs: every product of a watched weight, reported as it is computed.

A `ProductWatch` sees the calls of `F.linear`, the convolutions, `addmm` and the embeddings while a model runs: of
subclasses, functional uses and tied weights alike, each with the input that the product gets (padded, scaled).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pared.model.recorded.values import is_transformed

Kind = Literal["linear", "conv", "embedding"]


@dataclass(frozen=True, eq=False)
class Product:
    """One product of a watched weight.

    Args:
        tensor: the weight's name.
        kind: the kind of function.
        x: the input: floats, or the indices into an embedding table. If gradients are watched, an alias whose gradient
            comes from this product only.
        y: the output.
    """

    tensor: str
    kind: Kind
    x: Tensor
    y: Tensor


# The watched functions: kind, position of the input, and position of the weight among the arguments.
PRODUCTS: Final[dict[Callable[..., Any], tuple[Kind, int, int]]] = {
    F.linear: ("linear", 0, 1),
    torch.addmm: ("linear", 1, 2),
    F.conv1d: ("conv", 0, 1),
    F.conv2d: ("conv", 0, 1),
    F.conv3d: ("conv", 0, 1),
    torch.conv_transpose1d: ("conv", 0, 1),
    torch.conv_transpose2d: ("conv", 0, 1),
    torch.conv_transpose3d: ("conv", 0, 1),
    F.embedding: ("embedding", 0, 1),
    F.embedding_bag: ("embedding", 0, 1),
}


class _Straight(torch.autograd.Function):
    """A result whose gradient is handed on as it is."""

    @staticmethod
    def forward(_ctx: Any, _x: Tensor, result: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _FewChannels(torch.autograd.Function):
    """A convolution's output, with the gradient by an input of few channels as one product of matrices.

    oneDNN took 15 times as long over it as over the gradient by the weight where CREPE has one channel.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, *how: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.how = x.shape[2:], how
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation = ctx.how
        columns = weight.flatten(1).T @ gradients[0].flatten(2)
        by_input = F.fold(columns, ctx.size, weight.shape[2:], dilation, padding, stride)
        return gradients[0], by_input, None, None, None, None


_FEW: Final = 4  # channels
_OPTIONS: Final = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}  # of F.conv2d, in order


def _product(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], x: Tensor) -> Any:
    """What a function gives, with a gradient by its input `x`, a leaf."""
    how = {**_OPTIONS, **dict(zip(_OPTIONS, args[2:], strict=False)), **kwargs}
    is_plain = func is F.conv2d and x.dim() == 4 and how["groups"] == 1 and not isinstance(how["padding"], str)
    # Columns take the memory of that many channels of the output.
    if not is_plain or x.shape[1] > _FEW or args[1][0].numel() > _FEW * len(args[1]):
        return func(*args, **kwargs)
    y = func(x.detach(), *args[1:], **kwargs)
    return _FewChannels.apply(y, x, args[1].detach(), how["stride"], how["padding"], how["dilation"])  # type: ignore[no-untyped-call]  # as torch has it


# What cuts a result off from what it was computed from: by name, and by steps, whose slope is 0 but 1 in the mean.
_DETACHED: Final[tuple[Callable[..., Any], ...]] = (Tensor.detach, torch.detach)
_STEPS: Final[tuple[Callable[..., Any], ...]] = (
    *(torch.round, torch.floor, torch.ceil, torch.trunc, torch.fix),
    *(Tensor.round, Tensor.floor, Tensor.ceil, Tensor.trunc, Tensor.fix),
)
_CUTS: Final = frozenset((torch._C._set_grad_enabled, *_DETACHED, *_STEPS))


class ProductWatch(TorchFunctionMode):
    """While it is entered, reports each product of a watched weight.

    Args:
        names: the names of the watched tensors, by `id`.
        tell: called with each product, right after it was computed.
        gradients: give each product an alias of its input, so that the gradient by it can be asked for.
        through: let gradients through where the model cuts them off, by `torch.no_grad`, `detach` or rounding: what
            is computed before that changes the output all the same.

    Attributes:
        otherwise: the names of watched tensors from which other functions computed a tensor, such as a transposition.

    >>> layer, seen = torch.nn.Linear(3, 2), []
    >>> with ProductWatch({id(layer.weight): "weight"}, seen.append):
    ...     y = layer(torch.zeros(4, 3))
    >>> seen[0].tensor, seen[0].kind, seen[0].x.shape
    ('weight', 'linear', torch.Size([4, 3]))
    """

    def __init__(
        self,
        names: Mapping[int, str],
        tell: Callable[[Product], None],
        *,
        gradients: bool = False,
        through: bool = False,
    ) -> None:
        super().__init__()
        self._names = names
        self._tell = tell
        self._gradients = gradients
        self._through = through
        self.otherwise: set[str] = set()
        self._slices: dict[int, tuple[Tensor, ...]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function, and report it if it is a product of a watched weight."""
        kwargs = kwargs or {}
        if is_transformed():  # by `torch.func`: a tensor stands for many, or for a derivative
            return func(*args, **kwargs)
        if self._through and func in _CUTS:
            return self._uncut(func, args, kwargs)
        if func == Tensor.__getitem__ and self._is_slice(*args):
            return self._slice(*args)
        kind, input_place, weight_place = PRODUCTS.get(func, ("linear", 0, len(args)))
        if func in PRODUCTS and len(args) <= weight_place and "weight" in kwargs:  # the name in all but addmm
            rest = {name: value for name, value in kwargs.items() if name not in ("input", "weight")}
            args, kwargs = (*args, *(kwargs[name] for name in ("input", "weight")[len(args) :])), rest
        if weight_place >= len(args) or id(args[weight_place]) not in self._names:
            y = func(*args, **kwargs)
            if isinstance(y, Tensor):
                self.otherwise |= {self._names[id(arg)] for arg in args if id(arg) in self._names}
            return y
        x = args[input_place]
        if self._gradients and x.is_floating_point():
            x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            args = [*args[:input_place], x, *args[input_place + 1 :]]
        y = _product(func, args, kwargs, x) if x.is_leaf and x.requires_grad else func(*args, **kwargs)
        self._tell(Product(self._names[id(args[weight_place])], kind, x, y))
        return y

    def _is_slice(self, weight: Tensor, index: object) -> bool:
        """Whether one matrix of a stack is asked for, and its gradient will be."""
        if id(weight) not in self._names or weight.dim() < 3 or not (self._gradients and torch.is_grad_enabled()):
            return False
        if isinstance(index, Tensor):
            return index.dim() == 0 and index.dtype == torch.int64
        return isinstance(index, int) and not isinstance(index, bool)

    def _slice(self, weight: Tensor, index: Tensor | int) -> Tensor:
        """One matrix of a stack: all come from one split, whose gradient is one stack instead of a stack for each."""
        self.otherwise.add(self._names[id(weight)])
        if id(weight) not in self._slices:
            self._slices[id(weight)] = weight.unbind(0)
        return self._slices[id(weight)][int(index)]

    @staticmethod
    def _uncut(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What a function that cuts gradients off returns, with a gradient where its input has one."""
        if func not in (*_DETACHED, *_STEPS):
            return None  # gradients stay switched on
        x = args[0] if args else kwargs.get("input")
        if type(x) is not Tensor or not x.requires_grad:
            return func(*args, **kwargs)
        if func in _DETACHED:
            return x.view_as(x)
        return _Straight.apply(x, func(*args, **kwargs).detach())  # type: ignore[no-untyped-call]  # as torch has it
