"""Where a scale for each input column of linear layers can go, so that it costs nothing when the model runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Fold:
    """Linear layers with one input, and what makes that input: columns of the ones and rows of the other can be scaled.

    Where the products' columns are multiplied by numbers and the source's rows divided by them, the model's function is
    the same, as nothing but a product stands between them.

    Args:
        source: the names of the tensors that make the input, an entry or a row for each column: weight and bias of a
            norm, or of the layer before.
        products: the names of the weights that are multiplied with it, each (rows, columns).
        run: where heads share rows of the source, the rows of a head; 0: each column has a row of its own.
        repeats: how many heads in turn have the same rows.
        offset: what the norm adds to its weight.
    """

    source: tuple[str, ...]
    products: tuple[str, ...]
    run: int = 0
    repeats: int = 1
    offset: float = 0.0

    def rows(self, columns: int) -> NDArray[np.int64]:
        """The row of the source that makes each column.

        >>> Fold(("v.weight",), ("o.weight",), run=2, repeats=2).rows(8).tolist()
        [0, 1, 0, 1, 2, 3, 2, 3]
        """
        places = np.arange(columns, dtype=np.int64)
        if not self.run:
            return places
        row: NDArray[np.int64] = places // (self.run * self.repeats) * self.run + places % self.run
        return row
