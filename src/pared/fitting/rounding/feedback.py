"""Rounding with error feedback: columns that are not rounded yet make up for the errors of those that are.

The error that counts is not that of the weights but that of the layer's output, `tr(E M E^T)` for a weight error E and
second moments M of the inputs. With `M = L D L^T` (L unit lower triangular), rounding columns one by one and pushing
each one's error into the later ones leaves `sum_j D_j * (rounding error of column j)^2`. `D_j`, the part of an input
that later inputs do not predict, is far less than `M_jj` when inputs are correlated. Sources: GPTQ (Frantar et
al. 2022, arXiv 2210.17323); successive cancellation in WaterSIC (arXiv 2603.04956).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Final, Protocol

import torch
from torch import Tensor

# Share of the mean second moment that is added to each one, so that inputs which calibration hardly saw still count.
DAMPING: Final = 0.05
# Columns that are rounded before their errors are passed on to all later columns in one product; for speed only.
_COLUMNS_AT_ONCE: Final = 64
# Entries of moments that are factored at once, to bound memory: 128 MB for each float64 copy.
_MAX_ENTRIES: Final = 1 << 24


@dataclass(frozen=True, eq=False)
class Factor:
    """Second moments of inputs, factored for rounding; `blocks` independent matrices of `columns` inputs each.

    Args:
        order: int64 (blocks, columns): the columns in the order of rounding.
        spill: float32 (blocks, columns, columns), in that order: what a column's unit error adds to later ones.
        remaining: float64 (blocks, columns), in that order: the squared error of the output that a unit error of a
            column leaves after feedback, `D_j` above.
    """

    order: Tensor
    spill: Tensor
    remaining: Tensor

    def some(self, blocks: Tensor) -> Factor:
        """The blocks at these indices, int64 (some,)."""
        return Factor(self.order[blocks], self.spill[blocks], self.remaining[blocks])


def factor(moments: Tensor, damping: float = DAMPING) -> Factor:
    """Order and factor second moments.

    Args:
        moments: float32 (blocks, columns, columns), symmetric and positive semi-definite.
        damping: share of the mean second moment that is added to each, see `DAMPING`.

    >>> f = factor(torch.tensor([[[1.0, 0.9], [0.9, 2.0]]]))
    >>> f.order.tolist(), bool(f.remaining.sum() < 3.0)
    ([[1, 0]], True)
    """
    blocks, columns, _ = moments.shape
    at_once = max(1, _MAX_ENTRIES // columns**2)
    if blocks > at_once:
        factors = [factor(some, damping) for some in moments.split(at_once)]
        return Factor(*(torch.cat([getattr(one, field.name) for one in factors]) for field in fields(Factor)))
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


class Quantizer(Protocol):
    """Rounds one column of every block at a time: which numbers a column can have, and which codes they get."""

    def round(self, column: Tensor, index: Tensor, codes: Tensor, error: Tensor) -> None:
        """Round a column.

        Args:
            column: float32 (blocks, rows): the weights, with what the errors of earlier columns have added.
            index: int64 (blocks,): which column of its block it is, in the order of the weights.
            codes: float32 (blocks, rows): filled with whole numbers.
            error: float32 (blocks, rows): filled with the column, less what the codes stand for.
        """
        ...


@dataclass(frozen=True, eq=False)
class RowSteps:
    """One step for each row: `value = step[row] * code`.

    Args:
        steps: float32 (blocks, rows), each positive or 0; a step of 0 gives zeros.
        limit: codes are clamped to plus and minus this. A row with a code at a limit may have been clamped; it is
            better rounded again with a larger step.
    """

    steps: Tensor
    limit: int

    @functools.cached_property
    def _inverse(self) -> Tensor:
        return torch.where(self.steps > 0, self.steps.reciprocal(), torch.zeros_like(self.steps))

    def round(self, column: Tensor, index: Tensor, codes: Tensor, error: Tensor) -> None:  # noqa: ARG002  # all are alike
        """Round a column, see `Quantizer`."""
        torch.mul(column, self._inverse, out=codes)
        codes.round_().clamp_(-self.limit, self.limit)
        torch.addcmul(column, codes, self.steps, value=-1, out=error)


def feedback(weights: Tensor, factored: Factor, quantizer: Quantizer, block: int = _COLUMNS_AT_ONCE) -> Tensor:
    """Round rows of weights with error feedback.

    Args:
        weights: float32 (blocks, rows, columns).
        factored: the factor of the second moments, with the same blocks and columns.
        quantizer: rounds the columns one after the other, in the factor's order.
        block: columns that are rounded before their errors are passed on; changes speed only.

    Returns:
        codes, float32 (blocks, rows, columns): whole numbers.

    >>> f = factor(torch.tensor([[[1.0, 0.99], [0.99, 1.0]]]), damping=0.0)
    >>> steps = RowSteps(torch.tensor([[1.0]]), 127)
    >>> feedback(torch.tensor([[[0.4, 0.4]]]), f, steps).tolist()  # nearest gives 0, 0
    [[[0.0, 1.0]]]
    """
    columns = weights.shape[2]
    # Transposed, so that a column is contiguous in memory.
    rest = weights.gather(2, factored.order[:, None, :].expand_as(weights)).transpose(1, 2).contiguous()
    codes = torch.empty_like(rest)
    order = factored.order.T.contiguous()
    for start in range(0, columns, block):
        end = min(start + block, columns)
        inside = factored.spill[:, start:end, start:end]
        errors = _round_block(rest[:, start:end], inside, codes[:, start:end], order[start:end], quantizer)
        if end < columns:
            spill = factored.spill[:, start:end, end:].transpose(1, 2)
            rest[:, end:].baddbmm_(spill, errors)
    placed = torch.empty_like(codes).scatter_(1, factored.order[:, :, None].expand_as(codes), codes)
    return placed.transpose(1, 2)


def _round_block(rest: Tensor, spill: Tensor, codes: Tensor, order: Tensor, quantizer: Quantizer) -> Tensor:
    """Round some columns in turn, into `codes`, and push their errors into `rest`.

    Args:
        rest: float32 (blocks, columns, rows): the columns' weights with the errors of earlier columns; changed.
        spill: float32 (blocks, columns, columns): what each column's error adds to each later one.
        codes: float32 (blocks, columns, rows): filled.
        order: int64 (columns, blocks): which columns of the weights they are.
        quantizer: rounds them.

    Returns:
        the errors of the columns, float32 (blocks, columns, rows).
    """
    errors = torch.empty_like(codes)
    for j in range(rest.shape[1]):
        quantizer.round(rest[:, j], order[j], codes[:, j], errors[:, j])
        if j + 1 < rest.shape[1]:
            # A later column w_k with spill s becomes w_k + s * error: its input stands in for this column's.
            rest[:, j + 1 :].baddbmm_(spill[:, j, j + 1 :, None], errors[:, j, None, :])
    return errors
