"""Rounding with error feedback: columns that are not rounded yet make up for the errors of those that are.

The error that counts is not that of the weights but that of the layer's output, `tr(E M E^T)` for a weight error E and
second moments M of the inputs. With `M = U D U^T` (U unit upper triangular) that is `sum_j D_j * |(E U)_j|^2`, and
column j of `E U` is the error of column j plus what U makes of the errors of earlier ones. So each column is rounded
after that is added to it, which leaves `sum_j D_j * (rounding error of column j)^2`. `D_j`, the part of an input that
later inputs do not predict, is far less than `M_jj` when inputs are correlated. Sources: GPTQ (Frantar et
al. 2022, arXiv 2210.17323), which comes to the same by an inverse; LDLQ in QuIP (Chee et al. 2023, arXiv 2307.13304),
by a factor alone; successive cancellation in WaterSIC (arXiv 2603.04956).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Final, Protocol

import torch
from torch import Tensor

from pared.switches import device

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
        spill: float32, or float16, (blocks, columns, columns), in that order: what a unit error of a column, from its
            weight to what it has become, adds to each later one (in its row); unit upper triangular.
        remaining: float64 (blocks, columns), in that order: the squared error of the output that a unit error of a
            column leaves after feedback, `D_j` above.
    """

    order: Tensor
    spill: Tensor
    remaining: Tensor

    def some(self, blocks: Tensor) -> Factor:
        """The blocks at these indices, int64 (some,)."""
        return Factor(self.order[blocks], self.spill[blocks], self.remaining[blocks])

    def on(self, kind: str) -> Factor:
        """The same on a kind of device."""
        return Factor(self.order.to(kind), self.spill.to(kind), self.remaining.to(kind))

    def halved(self) -> Factor:
        """The same in half the memory, to be kept: with damping, entries are below sqrt(columns / damping)."""
        return replace(self, spill=self.spill.half())


def factor(moments: Tensor, damping: float = DAMPING) -> Factor:
    """Order and factor second moments, on `switches.device()`.

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
    if moments.device.type != device():
        return factor(moments.to(device()), damping).on(moments.device.type)
    diagonal = moments.diagonal(dim1=1, dim2=2).double()
    mean = diagonal.mean(1, keepdim=True)
    damped = diagonal + damping * torch.where(mean > 0, mean, torch.ones_like(mean))
    order = damped.argsort(dim=1, descending=True, stable=True)
    # Factored from the last column on, to be upper triangular: P = R R^T is L L^T of the columns in reverse.
    backward = order.flip(1)
    rows = moments.gather(1, backward[:, :, None].expand_as(moments))
    exact = rows.gather(2, backward[:, None, :].expand_as(moments)).double()
    exact.diagonal(dim1=1, dim2=2).copy_(damped.gather(1, backward))
    lower = torch.linalg.cholesky(exact)
    scale = lower.diagonal(dim1=1, dim2=2)
    remaining = scale.square().flip(1)
    spill = (lower / scale[:, None, :]).float().flip(1, 2)
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

    def on(self, kind: str) -> Quantizer:
        """The same on a kind of device."""
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

    def on(self, kind: str) -> RowSteps:
        """The same on a kind of device."""
        return replace(self, steps=self.steps.to(kind))


def feedback(weights: Tensor, factored: Factor, quantizer: Quantizer, block: int = _COLUMNS_AT_ONCE) -> Tensor:
    """Round rows of weights with error feedback, on `switches.device()`.

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
    if weights.device.type != device():
        there = feedback(weights.to(device()), factored.on(device()), quantizer.on(device()), block)
        return there.to(weights.device)
    columns = weights.shape[2]
    # Transposed, so that a column is contiguous in memory.
    own = weights.gather(2, factored.order[:, None, :].expand_as(weights)).transpose(1, 2).contiguous()
    rest, codes, order = own.clone(), torch.empty_like(own), factored.order.T.contiguous()
    for start in range(0, columns, block):
        some = slice(start, min(start + block, columns))
        inside = factored.spill[:, some, some].float()
        errors = _round_block(own[:, some], rest[:, some], inside, codes[:, some], order[some], quantizer)
        if some.stop < columns:
            spill = factored.spill[:, some, some.stop :].float()
            rest[:, some.stop :].baddbmm_(spill.transpose(1, 2), errors)
    placed = torch.empty_like(codes).scatter_(1, factored.order[:, :, None].expand_as(codes), codes)
    return placed.transpose(1, 2)


def _round_block(
    own: Tensor, rest: Tensor, spill: Tensor, codes: Tensor, order: Tensor, quantizer: Quantizer
) -> Tensor:
    """Round some columns in turn, into `codes`.

    Args:
        own: float32 (blocks, columns, rows): the columns' weights.
        rest: the same with what the errors of columns before these add; changed.
        spill: float32 (blocks, columns, columns): what each column's error adds to each later one.
        codes: float32 (blocks, columns, rows): filled.
        order: int64 (columns, blocks): which columns of the weights they are.
        quantizer: rounds them.

    Returns:
        the errors of the columns, from the weights to what they have become, float32 (blocks, columns, rows).
    """
    columns = rest.shape[1]
    # An error of a column is its rounding error, less what was added to it before. Solved for the latter, U becomes its
    # inverse: only rounding errors are left to be passed on here.
    identity = torch.eye(columns, dtype=spill.dtype, device=spill.device).expand_as(spill)
    inverse = torch.linalg.solve_triangular(spill, identity, upper=True, unitriangular=True).transpose(1, 2)
    rest.sub_(own)
    rest.copy_(torch.baddbmm(own, inverse, rest))
    inverse = inverse.contiguous()
    errors = torch.empty_like(codes)
    each = zip(rest.unbind(1), order, codes.unbind(1), errors.unbind(1), strict=True)
    for j, (column, index, code, error) in enumerate(each):
        if j:
            column[:, None].baddbmm_(inverse[:, None, j, :j], errors[:, :j], alpha=-1)
        quantizer.round(column, index, code, error)
    return torch.sub(own, rest).add_(errors)
