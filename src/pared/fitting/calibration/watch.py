"""Where weights meet their inputs: every product of a watched weight, as it happens, whoever asks for it.

A `Watch` sees the calls of `F.linear`, the convolutions, `addmm` and the embeddings while a model runs, so subclasses,
functional uses and tied weights are seen alike, each with the input as the product gets it (padded, scaled).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Kind = Literal["linear", "conv", "embedding"]


@dataclass(frozen=True, eq=False)
class Product:
    """One product of a watched weight.

    Args:
        tensor: the weight's name.
        kind: of product.
        x: its input: floats, or the indices into a table. With gradients watched, an alias whose gradient is this
            product's alone.
        y: its output.
    """

    tensor: str
    kind: Kind
    x: Tensor
    y: Tensor


# The functions that are watched, with the places of the input and of the weight among their arguments.
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


class Watch(TorchFunctionMode):
    """While it is entered, tells of each product of a watched weight.

    Args:
        names: of the watched tensors, by `id`.
        tell: called with each product, right after it was computed.
        gradients: let each product have an input of its own, whose gradient can be had.

    Attributes:
        otherwise: watched tensors that other functions than the products took and gave a tensor for, a transposition
            for instance.

    >>> layer, seen = torch.nn.Linear(3, 2), []
    >>> with Watch({id(layer.weight): "weight"}, seen.append):
    ...     y = layer(torch.zeros(4, 3))
    >>> seen[0].tensor, seen[0].kind, seen[0].x.shape
    ('weight', 'linear', torch.Size([4, 3]))
    """

    def __init__(self, names: Mapping[int, str], tell: Callable[[Product], None], *, gradients: bool = False) -> None:
        super().__init__()
        self._names = names
        self._tell = tell
        self._gradients = gradients
        self.otherwise: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function; tell of it if it is a product of a watched weight."""
        kwargs = kwargs or {}
        kind, input_place, weight_place = PRODUCTS.get(func, ("linear", 0, len(args)))
        if func in PRODUCTS and len(args) <= weight_place and "weight" in kwargs:  # the name in all but addmm
            rest = {name: value for name, value in kwargs.items() if name not in ("input", "weight")}
            args, kwargs = (*args, *(kwargs[name] for name in ("input", "weight")[len(args) :])), rest
        if weight_place >= len(args) or id(args[weight_place]) not in self._names:
            y = func(*args, **kwargs)
            if isinstance(y, Tensor):
                self.otherwise |= {self._names[id(one)] for one in args if id(one) in self._names}
            return y
        x = args[input_place]
        if self._gradients and x.is_floating_point():
            x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            args = [*args[:input_place], x, *args[input_place + 1 :]]
        y = func(*args, **kwargs)
        self._tell(Product(self._names[id(args[weight_place])], kind, x, y))
        return y
