"""Refinements that are switched by other statistics, or by patching functions of the library for one series."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.calibrated import Calibrated
from pared.fitting.calibration.sensitivity import Sensitivity, TensorStats
from pared.fitting.rounding import curves, feedback, importance, targets
from pared.formats import coded, streams

# Shares of the ratio of step to spread by which rate-aware rounding moves the threshold between two codes. Where an
# octave of the step costs a bit, the exact optimum for a two-sided exponential distribution is 0.118.
DEAD_ZONES = (0.06, 0.12)


@contextlib.contextmanager
def patched(module: Any, **functions: Any) -> Iterator[None]:
    own = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(module, name, function)


def _with(known: Calibrated, change: Callable[[TensorStats], TensorStats]) -> Calibrated:
    tensors = {name: change(stats) for name, stats in known.sensitivity.tensors.items()}
    return replace(known, sensitivity=Sensitivity(tensors, known.sensitivity.inputs))


def without_feedback(known: Calibrated) -> Calibrated:
    return _with(known, lambda stats: replace(stats, moments=None, unseen=None))


def flattered(known: Calibrated) -> Calibrated:
    """The factor comes from all calls, and the same calls judge it: the difference of the two is the whole again."""
    return _with(known, lambda s: replace(s, moments=2 * s.moments, unseen=s.moments) if s.moments is not None else s)


def one_exponent() -> Any:
    return patched(importance, _exponents=lambda rows, *_: torch.zeros(len(rows), dtype=torch.int64))


def uniform_tables() -> Any:
    return patched(importance, table_importance=lambda rows, _: torch.full_like(rows, float(rows.mean())))


def one_class() -> Any:
    return patched(streams, _classify=lambda _: None)


def float_steps() -> Any:
    return patched(coded, encode_steps=lambda step: streams.EncodedPart(step.astype("<f4").tobytes()))


def dead_zone(share: float) -> contextlib.ExitStack:
    """Between two codes the nearer to zero, which is the shorter one, is taken a little beyond the middle."""
    stack = contextlib.ExitStack()
    rate_aware = _RateAware(share)
    stack.enter_context(patched(feedback.RowSteps, round=lambda *given: rate_aware.round(*given)))
    for module in (curves, targets):
        stack.enter_context(patched(module, round_rows=_RateAware(share).rows))
    return stack


@dataclass(frozen=True)
class _RateAware:
    """Rounding by error and rate: the variance of the error rises by less than the bits that it saves are worth."""

    share: float

    def codes(self, scaled: Tensor, spread: Tensor) -> Tensor:
        """The codes of weights in units of their steps, whose spread is in the same unit."""
        moved = self.share / spread.clamp(min=0.25)
        return scaled.sign() * (scaled.abs() + 0.5 - moved).floor_().clamp_(min=0)

    def rows(self, matrix: Tensor, steps: Tensor, limit: int) -> Tensor:
        inverse = torch.where(steps > 0, steps.reciprocal(), torch.zeros_like(steps))
        scaled = matrix * inverse[:, None]
        return self.codes(scaled, scaled.square().mean(1, keepdim=True).sqrt()).clamp_(-limit, limit)

    def round(self, by_row: feedback.RowSteps, column: Tensor, _: Tensor, codes: Tensor, error: Tensor) -> None:
        """As `RowSteps.round`: (blocks, rows)."""
        inverse = torch.where(by_row.steps > 0, by_row.steps.reciprocal(), torch.zeros_like(by_row.steps))
        scaled = column * inverse
        spread = scaled.square().mean(1, keepdim=True).sqrt()
        codes.copy_(self.codes(scaled, spread)).clamp_(-by_row.limit, by_row.limit)
        torch.addcmul(column, codes, by_row.steps, value=-1, out=error)
