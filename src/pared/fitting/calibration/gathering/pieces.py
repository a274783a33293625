"""The gradient of a large weight in runs of rows, from the inputs and the output gradients of its products.

The gradient of a table of a language model takes as many bytes as the table, and its squares take more. By rows it is
never whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from pared.fitting.calibration.blocks import blocks_of
from pared.fitting.calibration.watch import Product
from pared.model.tensors import ModelTensor

LARGE: Final = 1 << 24  # numbers: weights of at least this many have gradients in pieces
_AT_ONCE: Final = 1 << 22  # numbers of a piece


def may_be_in_pieces(tensor: ModelTensor) -> bool:
    """Whether the gradient of a weight is better made in pieces, if only products use the weight."""
    weight = tensor.tensor
    plain = weight.dim() == 2 and tensor.view.split == tuple(weight.shape) and tensor.view.rows == (0,)
    return weight.numel() >= LARGE and plain and tensor.kind == "parameter" and blocks_of(tensor).groups == 1


class Pieces:
    """The products of one weight in one call, from which its gradient is made.

    Args:
        tensor: the weight, float32 (rows, columns).
    """

    def __init__(self, tensor: ModelTensor) -> None:
        self._shape = tuple(tensor.tensor.shape)
        self._padding: int | None = getattr(tensor.module, "padding_idx", None)
        self._found: list[tuple[str, Tensor, Tensor]] = []  # kind, input, gradient of the output

    def watch(self, product: Product) -> bool:
        """Keep what a product says, as soon as the gradient of its output comes; False for one that is of no use."""
        if product.kind not in ("linear", "embedding"):
            return False
        if not product.y.requires_grad:
            product.y.requires_grad_()
        kind, x = product.kind, product.x.detach()
        found = self._found
        product.y.register_hook(lambda gradient: found.append((kind, x, gradient.detach())))
        return True

    @property
    def any(self) -> bool:
        """Whether a gradient came."""
        return bool(self._found)

    def clear(self) -> None:
        """Forget the products of the last call."""
        self._found.clear()

    def gradients(self) -> Iterator[tuple[int, Tensor]]:
        """The first row and the gradient, float32 (some rows, columns), of each piece."""
        rows, columns = self._shape
        at_once = max(1, _AT_ONCE // columns)
        for start in range(0, rows, at_once):
            piece = torch.zeros(min(at_once, rows - start), columns, device=self._found[0][2].device)
            for kind, x, gradient in self._found:
                if kind == "linear":
                    some = gradient.reshape(-1, rows)[:, start : start + at_once]
                    piece.addmm_(some.T.float(), x.reshape(-1, columns).float())
                    continue
                index, of_rows = x.reshape(-1), gradient.reshape(-1, columns)
                here = (index >= start) & (index < start + len(piece))
                if self._padding is not None:
                    here &= index != self._padding
                piece.index_add_(0, index[here] - start, of_rows[here].float())
            yield start, piece
