"""What noise in one layer's input costs, by the gradients of that input."""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor

LEVELS: Final = 255  # steps between the ends of an unsigned 8-bit range


class Noise:
    """What noise in one layer's input costs, summed over its products.

    Attributes:
        total: the damage if each number of the input had an independent error of variance 1.
        dynamic: the damage of rounding each row of the input to 8 bits in its own range.
    """

    def __init__(self, total: float = 0.0, dynamic: float = 0.0) -> None:
        self.total, self.dynamic = total, dynamic

    @property
    def seen(self) -> bool:
        """Whether any gradient came."""
        return self.total > 0

    def add(self, x: Tensor, gradient: Tensor, by_rows: bool) -> None:
        """Count an input and its gradient.

        Args:
            x: floating, of any shape.
            gradient: a tensor of the same shape.
            by_rows: whether each run of numbers along the last dimension would be rounded in a range of its own.
        """
        energy = gradient.float().square()
        flat, spread = (t.reshape(-1, t.shape[-1] if by_rows else t.numel()) for t in (x.float(), energy))
        total = float(spread.sum())
        if not math.isfinite(total):
            return  # the gradient of the weight is not finite either, which is told of where it is summed up
        self.total += total
        reach = (flat.amax(1).clamp(min=0) - flat.amin(1).clamp(max=0)) / LEVELS
        self.dynamic += float((reach.square() / 12 * spread.sum(1)).sum())
