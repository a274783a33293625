"""How alike two arrays are: signal to noise, the largest error, the cosine; in blocks, so that memory stays small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pared.formats.dtypes import Array

Floats = NDArray[np.float64]

_BLOCK: Final = 1 << 16  # numbers at a time: what is computed of them stays in the cache


@dataclass(frozen=True)
class Similarity:
    """What tells a second array `b` from a first one `a`.

    Numbers that are NaN in both, or the same infinity, count as equal and in nothing else.

    Args:
        count: how many numbers each has.
        equal: how many are the same in both; -0 is 0.
        broken: how many are not finite in one of them, and not the same in the other.
        signal: the sum of a^2, over what is finite.
        other: the sum of b^2.
        product: the sum of a * b.
        noise: the sum of (b - a)^2.
        largest: the greatest |a|.
        error: the greatest |b - a|.

    >>> found = measure(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    >>> round(found.sqnr, 6), found.error, found.relative_error
    (20.0, 0.5, 0.125)
    """

    count: int = 0
    equal: int = 0
    broken: int = 0
    signal: float = 0.0
    other: float = 0.0
    product: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    error: float = 0.0

    @property
    def same(self) -> bool:
        """Whether every number is the same in both."""
        return self.equal == self.count

    @property
    def sqnr(self) -> float:
        """The signal to noise ratio in dB, 10 log10(sum a^2 / sum (b - a)^2).

        Infinite where all is equal; minus infinity where a is zero and b is not, or where something is broken; NaN
        where squares are beyond the range of float64.
        """
        if self.same:
            return math.inf
        if self.broken or not self.signal:
            return -math.inf
        if math.isinf(self.signal):
            return math.nan
        # A difference whose square underflows counts as the smallest number there is.
        return 10 * (math.log10(self.signal) - math.log10(max(self.noise, _LEAST)))

    @property
    def cosine(self) -> float:
        """The cosine of the angle between both: 1 if all is equal, NaN where there is no angle: see `no_angle`."""
        if self.same:
            return 1.0
        if not (self.signal and self.other) or self.broken:
            return math.nan
        if math.isinf(self.signal) or math.isinf(self.other):
            return math.nan
        return max(-1.0, min(1.0, self.product / (math.sqrt(self.signal) * math.sqrt(self.other))))

    @property
    def no_angle(self) -> str:
        """Why the cosine is NaN, in a word or three; "" where it is a number.

        >>> measure(np.zeros(2), np.ones(2)).no_angle, measure(np.ones(2), np.full(2, np.nan)).no_angle
        ('A is 0', 'not finite')
        """
        if not math.isnan(self.cosine):
            return ""
        if self.broken:
            return "not finite"
        if not self.largest:
            return "A is 0"
        return "too small" if not self.signal else "B is 0" if not self.other else "too large"

    @property
    def relative_error(self) -> float:
        """The largest error as a share of the greatest |a|."""
        return self.error / self.largest if self.largest else math.inf if self.error else 0.0

    def __add__(self, other: Similarity) -> Similarity:
        """The similarity of both pairs of arrays, concatenated."""
        return Similarity(
            self.count + other.count,
            self.equal + other.equal,
            self.broken + other.broken,
            self.signal + other.signal,
            self.other + other.other,
            self.product + other.product,
            self.noise + other.noise,
            max(self.largest, other.largest),
            max(self.error, other.error),
        )


_LEAST: Final = 5e-324


def measure(a: Array, b: Array) -> Similarity:
    """Compare two arrays of one shape.

    Args:
        a: the reference, as `Listing.array` gives it: mapped, strided, of any type.
        b: the other, of any type.

    Returns:
        sums in float64. Squares beyond its range count as infinite, so that the ratio of numbers above 1e154 is NaN.
    """
    found = Similarity()
    for one, two in _blocks(a, b):
        found += _measure(one, two)
    return found


def identical(a: Array, b: Array) -> bool:
    """Whether two arrays of one shape and type have the same bits."""
    return all(_bits(one) == _bits(two) for one, two in _blocks(a, b))


def _bits(array: Array) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _measure(a: Array, b: Array) -> Similarity:
    # 64-bit integers are compared exactly, which float64 cannot do.
    whole = a.dtype == b.dtype and a.dtype.kind in "iu"
    x, y = as_numbers(a).reshape(-1), as_numbers(b).reshape(-1)
    same = (a == b).reshape(-1) if whole else x == y
    count, equal = len(x), int(same.sum())
    finite = np.isfinite(x) & np.isfinite(y)
    broken = 0
    if not finite.all():
        alike = same | (np.isnan(x) & np.isnan(y))
        equal, broken = int(alike.sum()), int((~alike & ~finite).sum())
        x, y = x[finite], y[finite]
    if not x.size:
        return Similarity(count, equal, broken)
    with np.errstate(over="ignore"):
        difference = y - x
    largest = float(np.abs(x).max())
    error = math.inf if broken else float(np.abs(difference).max())
    noise = _product(difference, difference)
    return Similarity(count, equal, broken, _product(x, x), _product(y, y), _product(x, y), noise, largest, error)


def _product(x: Floats, y: Floats) -> float:
    """The inner product; not by np.dot, whose threads wait for each other at every block when cores are busy."""
    return float(np.einsum("i,i->", x, y))


def _blocks(a: Array, b: Array) -> Iterator[tuple[Array, Array]]:
    """Both arrays in blocks of at most `_BLOCK` numbers, without copying."""
    if a.size <= _BLOCK:
        if a.size:
            yield a, b
        return
    axis = next(i for i, n in enumerate(a.shape) if n > 1)
    rows = max(1, _BLOCK * a.shape[axis] // a.size)
    a, b = (np.moveaxis(array, axis, 0) for array in (a, b))
    for start in range(0, len(a), rows):
        yield from _blocks(a[start : start + rows], b[start : start + rows])


def as_numbers(array: Array) -> Floats:
    """The values of an array as float64; of complex numbers both parts, one behind the other in the last dimension.

    >>> as_numbers(np.array([1 + 2j])).tolist()
    [[1.0, 2.0]]
    """
    if array.dtype.kind == "c":
        array = np.stack([array.real, array.imag], -1)
    return array.astype(np.float64, copy=False)
