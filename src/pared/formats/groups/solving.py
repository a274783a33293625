"""Uniform grids for many groups of numbers at once: the candidates that are tried, and the best of them.

Groups are columns here, (numbers of a group, groups), so that sums over groups, and products with their steps, run
along memory. A step follows from codes by least squares; other steps give other codes, so several are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pared.formats.groups.grid import Floats

# Long groups stay as they are in memory: each is a run of numbers.
_LONG: Final = 512
# Of the mass of a group, in units: the squared error that rounding to float32 leaves of numbers on a grid, with room.
EXACT: Final = 1e-13
_ROUNDS: Final = 2  # codes, then the step for them, then codes again

Round = Callable[[Floats], Floats]
Pair = tuple[Floats, Floats]


@dataclass
class Best:
    """The best step, and least value, of each group so far, with the squared error.

    `curvature` is what the error grows by with the square of a change of the step, and `mass` with that of the least
    value.
    """

    error: Floats
    step: Floats
    least: Floats
    curvature: Floats
    mass: Floats

    @classmethod
    def of(cls, groups: Groups) -> Best:
        """Nothing yet."""
        error = np.full(groups.count, np.inf, np.float32)
        step, least, curvature = (np.zeros(groups.count, np.float32) for _ in range(3))
        return cls(error, step, least, curvature, groups.mass)

    def take(self, error: Floats, **found: Any) -> None:
        """Keep what is better; nothing is better than numbers on their grid, as far as float32 can tell."""
        better = (error < self.error) & (self.error > EXACT * self.mass)
        np.copyto(self.error, error, where=better)
        for name, values in found.items():
            np.copyto(getattr(self, name), values, where=better)


class Groups:
    """Numbers by groups, with their weights, and memory for codes and products.

    Args:
        numbers: (size, groups).
        weights: the same shape; None: all 1.
    """

    def __init__(self, numbers: Floats, weights: Floats | None) -> None:
        self.numbers = numbers
        self.weights = weights
        self.size, self.count = numbers.shape
        self.codes = np.empty_like(numbers)
        self._scratch = np.empty_like(numbers)
        full = np.full(self.count, self.size, np.float32)
        self.mass: Floats = full if weights is None else self._total(weights)

    def _total(self, values: Floats) -> Floats:
        found: Floats = np.add.reduce(values, 0)
        return found

    def round(self, step: Floats, least: Floats | None, low: Any, high: Any) -> None:
        """Find the codes nearest to the numbers."""
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            inverse = np.where(step != 0, np.float32(1) / step, np.float32(0))
            inverse[~np.isfinite(inverse)] = 0
        if least is None:
            np.multiply(self.numbers, inverse, out=self.codes)
        else:
            np.subtract(self.numbers, least, out=self.codes)
            self.codes *= inverse
        np.rint(self.codes, out=self.codes)
        np.clip(self.codes, low, high, out=self.codes)

    def products(self) -> tuple[Floats, Floats]:
        """The weighted sums of code * number and of code * code."""
        weighted = self.codes if self.weights is None else self.codes * self.weights
        np.multiply(weighted, self.numbers, out=self._scratch)
        mixed = self._total(self._scratch)
        np.multiply(weighted, self.codes, out=self._scratch)
        return mixed, self._total(self._scratch)

    def sums(self) -> tuple[Floats, Floats]:
        """The weighted sums of the codes and of the numbers."""
        if self.weights is None:
            return self._total(self.codes), self._total(self.numbers)
        np.multiply(self.codes, self.weights, out=self._scratch)
        codes = self._total(self._scratch)
        np.multiply(self.numbers, self.weights, out=self._scratch)
        return codes, self._total(self._scratch)

    def error(self, step: Floats, least: Floats | None) -> Floats:
        """The weighted squared error of the codes."""
        rest = self._scratch
        np.multiply(self.codes, step, out=rest)
        if least is not None:
            rest += least
        rest -= self.numbers
        np.multiply(rest, rest, out=rest)
        if self.weights is not None:
            rest *= self.weights
        return self._total(rest)


def laid_out(matrix: Floats, size: int, edge: bool = True) -> Floats:
    """The groups of each row as columns: (size, rows * groups).

    A last group that lacks columns repeats its last number, which changes neither its least nor its largest; or has
    zeros, where `edge` is false.

    >>> laid_out(np.array([[1, 2, 3]], np.float32), 2).tolist()
    [[1.0, 3.0], [2.0, 3.0]]
    """
    lacking = -matrix.shape[1] % size
    if lacking:
        matrix = np.pad(matrix, ((0, 0), (0, lacking)), "edge" if edge else "constant")
    groups = matrix.reshape(-1, size).T
    return groups if size > _LONG else np.ascontiguousarray(groups)


def units(numbers: Floats) -> Floats:
    """A power of two for each group, near its largest magnitude: squares of multiples of it stay within float32."""
    exponents = np.frexp(np.abs(numbers).max(0))[1]
    found: Floats = np.ldexp(np.float32(1), np.clip(exponents, -126, 126)).astype(np.float32)
    return found


def quotient(numerator: Floats, denominator: Floats) -> Floats:
    """A quotient that is 0 where it cannot be formed."""
    with np.errstate(all="ignore"):
        found = numerator / denominator
    found[~np.isfinite(found)] = 0
    return found


def fit_steps(groups: Groups, tried: Iterable[Pair], low: int, high: int, rounded: Round) -> Best:
    """The best step of each group, and the code that stands for 0.

    Args:
        groups: the numbers.
        tried: steps to begin with, each with the codes that stand for 0.
        low: the least code.
        high: the largest.
        rounded: rounds steps to those that can be stored.

    Returns:
        the code that stands for 0 as `least`.
    """
    best = Best.of(groups)

    def attempt(step: Floats, zero: Floats) -> None:
        groups.round(step, None, low - zero, high - zero)
        mixed, squares = groups.products()
        step = rounded(quotient(mixed, squares))
        best.take(groups.error(step, None), step=step, least=zero, curvature=squares)

    for step, zero in tried:
        attempt(rounded(step), zero)
    for _ in range(_ROUNDS):
        attempt(best.step.copy(), best.least.copy())
    return best


def fit_lines(groups: Groups, tried: Iterable[Pair], levels: int, rounded: Round, rounded_least: Round) -> Best:
    """The best step and least value for each group.

    Args:
        groups: the numbers.
        tried: steps and least values to begin with; each pair counts as it is, too.
        levels: the largest code; the least is 0.
        rounded: rounds steps to those that can be stored.
        rounded_least: rounds least values likewise.
    """
    best, mass = Best.of(groups), groups.mass

    def attempt(step: Floats, least: Floats) -> None:
        groups.round(step, least, 0, levels)
        given = groups.error(step, least)
        mixed, squares = groups.products()
        codes, numbers = groups.sums()
        spread = squares - quotient(codes * codes, mass)
        best.take(given, step=step, least=least, curvature=spread)
        step = rounded(quotient(mixed - quotient(codes * numbers, mass), spread))
        least = rounded_least(quotient(numbers - step * codes, mass))
        best.take(groups.error(step, least), step=step, least=least, curvature=spread)

    for step, least in tried:
        attempt(rounded(step), rounded_least(least))
    for _ in range(_ROUNDS):
        attempt(best.step.copy(), best.least.copy())
    return best
