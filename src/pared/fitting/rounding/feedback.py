"""Rounding with error feedback: what one column loses is made up for in the columns that are not rounded yet.

The error that counts is not that of the weights but that of the layer's output, `tr(E M E^T)` for a weight error E and
second moments M of the inputs. With `M = L D L^T` (L unit lower triangular), rounding columns one by one and pushing
each one's error into the later ones leaves `sum_j D_j * (rounding error of column j)^2`, where `D_j`, the part of an
input that later inputs do not predict, is far less than `M_jj` when inputs are correlated. Sources: GPTQ (Frantar et
al. 2022, arXiv 2210.17323); successive cancellation in WaterSIC (arXiv 2603.04956).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor

# Share of the mean second moment that is added to each: inputs that calibration hardly saw keep a weight of their own.
DAMPING: Final = 0.05
# Columns that are rounded before what they owe to all later ones is passed on in one product.
_BLOCK: Final = 64
# Entries of moments that are factored at once.
_MOST_ENTRIES: Final = 1 << 24


@dataclass(frozen=True, eq=False)
class Factor:
    """Second moments of inputs, factored for rounding; `blocks` independent matrices of `columns` inputs each.

    Args:
        order: int64 (blocks, columns): the columns in the order of rounding.
        spill: float32 (blocks, columns, columns), in that order: what each column's error adds to each later column.
        remaining: float64 (blocks, columns), in that order: the error that a unit error of a column leaves.
    """

    order: Tensor
    spill: Tensor
    remaining: Tensor

    def some(self, blocks: Tensor) -> Factor:
        """Only some of the blocks, by their indices."""
        return Factor(self.order[blocks], self.spill[blocks], self.remaining[blocks])


def factor(moments: Tensor, damping: float = DAMPING) -> Factor:
    """Order and factor second moments.

    Args:
        moments: (blocks, columns, columns), symmetric and positive semi-definite.
        damping: see `DAMPING`.

    >>> f = factor(torch.tensor([[[1.0, 0.9], [0.9, 2.0]]]))
    >>> f.order.tolist(), bool(f.remaining.sum() < 3.0)
    ([[1, 0]], True)
    """
    blocks, columns, _ = moments.shape
    at_once = max(1, _MOST_ENTRIES // columns**2)
    if blocks > at_once:  # float64 takes several times what the moments do
        parts = [factor(some, damping) for some in moments.split(at_once)]
        return Factor(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Factor)))
    exact = moments.double()
    diagonal = exact.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    ridge = damping * torch.where(mean > 0, mean, torch.ones_like(mean))
    exact = exact + torch.diag_embed(ridge.expand_as(diagonal))
    damped = exact.diagonal(dim1=1, dim2=2)
    order = damped.argsort(dim=1, descending=True, stable=True)
    exact = exact.gather(1, order[:, :, None].expand_as(exact)).gather(2, order[:, None, :].expand_as(exact))
    # Factored from the last column on: P = R R^T with R upper triangular, so inverse(P) = inverse(R)^T inverse(R).
    upper = torch.linalg.cholesky(exact.flip(1, 2)).flip(1, 2)
    identity = torch.eye(upper.shape[1], dtype=upper.dtype).expand_as(upper)
    inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
    scale = inverse.diagonal(dim1=1, dim2=2)
    remaining = scale.square().reciprocal()
    spill = (-inverse / scale[:, :, None]).float()
    return Factor(order, spill, remaining)


def feedback(weights: Tensor, factored: Factor, steps: Tensor, limit: int, block: int = _BLOCK) -> Tensor:
    """Round rows of weights to multiples of their steps with error feedback.

    Args:
        weights: float32 (blocks, rows, columns).
        factored: of the second moments, with the same blocks and columns.
        steps: float32 (blocks, rows), each positive or 0; a step of 0 gives zeros.
        limit: codes stay within plus and minus this; a row with a code at a limit may have been cut off, and is
            better solved again with a larger step.
        block: changes speed only.

    Returns:
        codes, float32 (blocks, rows, columns): whole numbers.

    >>> f = factor(torch.tensor([[[1.0, 0.99], [0.99, 1.0]]]), damping=0.0)
    >>> feedback(torch.tensor([[[0.4, 0.4]]]), f, torch.tensor([[1.0]]), 127).tolist()  # nearest gives 0, 0
    [[[0.0, 1.0]]]
    """
    columns = weights.shape[2]
    # Column by column: each is then one run of memory.
    rest = weights.gather(2, factored.order[:, None, :].expand_as(weights)).transpose(1, 2).contiguous()
    codes = torch.empty_like(rest)
    inverse = torch.where(steps > 0, steps.reciprocal(), torch.zeros_like(steps))
    for start in range(0, columns, block):
        end = min(start + block, columns)
        inside = factored.spill[:, start:end, start:end]
        errors = _round_block(rest[:, start:end], inside, codes[:, start:end], steps, inverse, limit)
        if end < columns:
            spill = factored.spill[:, start:end, end:].transpose(1, 2)
            rest[:, end:].baddbmm_(spill, errors)
    placed = torch.empty_like(codes).scatter_(1, factored.order[:, :, None].expand_as(codes), codes)
    return placed.transpose(1, 2)


def _round_block(rest: Tensor, spill: Tensor, codes: Tensor, steps: Tensor, inverse: Tensor, limit: int) -> Tensor:
    """Round some columns in turn, in place; what they did wrong, (blocks, columns, rows)."""
    errors = torch.empty_like(codes)
    for j in range(rest.shape[1]):
        torch.mul(rest[:, j], inverse, out=codes[:, j])
        codes[:, j].round_().clamp_(-limit, limit)
        torch.addcmul(rest[:, j], codes[:, j], steps, value=-1, out=errors[:, j])
        if j + 1 < rest.shape[1]:
            # A later column w_k with spill s becomes w_k + s * error: its input stands in for this column's.
            rest[:, j + 1 :].baddbmm_(spill[:, j, j + 1 :, None], errors[:, j, None, :])
    return errors
