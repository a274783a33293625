"""The allocation: one price for a byte decides every tensor's step at once.

At a price λ (damage per byte) each tensor takes the option with the least `damage + λ * bytes` (Shoham and Gersho
1988). Whatever the options are, as λ rises the chosen bytes never grow and the damage never falls, and no other choice
has less damage in as few bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, overload

import numpy as np
from numpy.typing import NDArray

# Relative width to which prices are bisected: choices are discrete, and closer prices give the same one.
_PRICE_TOLERANCE: Final = 1e-9


@dataclass(frozen=True, eq=False)
class Options:
    """What one tensor could become.

    Args:
        nbytes: float64 (options,): bytes of each option.
        damage: float64 (options,): expected share of the output's energy that each option loses.
    """

    nbytes: NDArray[np.float64]
    damage: NDArray[np.float64]


class Table(Sequence[Options]):
    """The options of all tensors in one array each, so that a price decides all of them at once.

    Args:
        tensors: the options of each tensor, one or more.
    """

    def __init__(self, tensors: Sequence[Options]) -> None:
        self._tensors = tuple(tensors)
        sizes = np.array([len(options.nbytes) for options in self._tensors], np.int64)
        self.starts = np.cumsum(sizes) - sizes
        self.owners = np.repeat(np.arange(len(sizes)), sizes)
        self.nbytes = np.concatenate([options.nbytes for options in self._tensors] or [np.zeros(0)])
        self.damage = np.concatenate([options.damage for options in self._tensors] or [np.zeros(0)])

    @overload
    def __getitem__(self, index: int) -> Options: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Options, ...]: ...
    def __getitem__(self, index: int | slice) -> Options | tuple[Options, ...]:
        """The options of a tensor."""
        return self._tensors[index]

    def __len__(self) -> int:
        return len(self._tensors)

    def least(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Find for each option the least value among the options of the same tensor."""
        lowest: NDArray[np.float64] = np.minimum.reduceat(values, self.starts)[self.owners]
        return lowest

    def firsts(self, marked: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The place of the first marked option of each tensor, of which each has one."""
        places = np.flatnonzero(marked)
        owners = self.owners[places]
        first: NDArray[np.int64] = places[np.append(True, owners[1:] != owners[:-1])]
        return first

    @functools.cached_property
    def ends(self) -> tuple[float, float]:
        """See `ends`."""
        return _ends(self._tensors)


def _table(tensors: Sequence[Options]) -> Table:
    return tensors if isinstance(tensors, Table) else Table(tensors)


@dataclass(frozen=True)
class Choice:
    """One option for each tensor.

    Args:
        price: λ, damage per byte, at which it was chosen.
        options: the index of each tensor's option.
        nbytes: the size of all tensors together.
        damage: the damage of all tensors together.
    """

    price: float
    options: tuple[int, ...]
    nbytes: float
    damage: float


def choose(tensors: Sequence[Options], price: float) -> Choice:
    """The best option of each tensor at a price; of two equally good ones the smaller.

    >>> tensor = Options(np.array([8.0, 4.0, 2.0]), np.array([0.0, 1.0, 5.0]))
    >>> [choose([tensor], price).options for price in (0.1, 1.0, 3.0)]
    [(0,), (1,), (2,)]
    """
    if not tensors:
        return Choice(price, (), 0.0, 0.0)
    table = _table(tensors)
    cost = table.damage + price * table.nbytes
    nbytes = np.where(cost == table.least(cost), table.nbytes, np.inf)
    best = table.firsts(nbytes == table.least(nbytes))
    # Summed one after the other: the sums of equal choices are equal.
    total, damage = (float(np.cumsum(values[best])[-1]) for values in (table.nbytes, table.damage))
    return Choice(price, tuple((best - table.starts).tolist()), total, damage)


def within_bytes(tensors: Sequence[Options], nbytes: float) -> Choice:
    """The choice of least damage among those at a price that take at most `nbytes`; else the smallest choice."""
    tensors = _table(tensors)
    low, high = tensors.ends
    return _cross(tensors, low, high, lambda choice: choice.nbytes > nbytes)[1]


def fill(tensors: Sequence[Options], choice: Choice, nbytes: float) -> Choice:
    """Spend the bytes that are left, one option at a time: that which saves most damage per byte and still fits.

    Args:
        tensors: the options of each tensor.
        choice: what to start from.
        nbytes: the bytes that all tensors may take.

    >>> tensors = [Options(np.array([9.0, 5.0, 2.0]), np.array([0.0, 3.0, 4.0]))]
    >>> fill(tensors, choose(tensors, 10.0), 6.0).options
    (1,)
    """
    table = _table(tensors)
    chosen = np.array(choice.options, np.int64)
    left = nbytes - choice.nbytes
    while len(chosen):
        present = (table.starts + chosen)[table.owners]
        more, saved = table.nbytes - table.nbytes[present], table.damage[present] - table.damage
        rates = np.where((more <= left) & (saved > 0), saved / np.maximum(more, 1e-9), 0.0)
        best = np.flatnonzero(rates == rates.max())
        owner = table.owners[best[-1]]  # of equally good tensors the last, and its first option
        option = best[table.owners[best] == owner][0]
        if rates[option] <= 0:
            break
        left -= float(more[option])
        chosen[owner] = option - table.starts[owner]
    pairs = list(zip(tensors, chosen.tolist(), strict=True))
    total = sum(float(tensor.nbytes[option]) for tensor, option in pairs)
    damage = sum(float(tensor.damage[option]) for tensor, option in pairs)
    return Choice(choice.price, tuple(chosen.tolist()), total, damage)


def within_damage(tensors: Sequence[Options], damage: float) -> Choice:
    """The smallest choice among those at a price that do at most this damage; else the least damaging one."""
    tensors = _table(tensors)
    low, high = tensors.ends
    return _cross(tensors, low, high, lambda choice: choice.damage <= damage)[0]


def ends(tensors: Sequence[Options]) -> tuple[float, float]:
    """A price so low that every tensor takes its least damaging option, and one so high that it takes its smallest.

    >>> low, high = ends([Options(np.array([4.0, 2.0]), np.array([1.0, 5.0]))])
    >>> low < 2 < high
    True
    """
    return _table(tensors).ends


def _ends(tensors: Sequence[Options]) -> tuple[float, float]:
    varied = [tensor for tensor in tensors if np.ptp(tensor.damage) > 0 and np.ptp(tensor.nbytes) > 0]
    if not varied:
        return 1.0, 1.0
    low = min(_least_difference(tensor.damage) / float(np.ptp(tensor.nbytes)) for tensor in varied)
    high = max(float(np.ptp(tensor.damage)) / _least_difference(tensor.nbytes) for tensor in varied)
    return low / 2, high * 2


def _least_difference(values: NDArray[np.float64]) -> float:
    """The least difference between two values that differ."""
    return float(np.diff(np.unique(values)).min())


def _cross(
    tensors: Sequence[Options], low: float, high: float, before: Callable[[Choice], bool]
) -> tuple[Choice, Choice]:
    """The last choice for which `before` holds and the first for which it does not, as the price rises to `high`.

    If it holds nowhere both are the first choice; if it holds everywhere both are the last.
    """
    first, last = choose(tensors, low), choose(tensors, high)
    if not before(first):
        return first, first
    if before(last):
        return last, last
    while high / low > 1 + _PRICE_TOLERANCE:
        middle = choose(tensors, math.sqrt(low * high))
        if before(middle):
            first, low = middle, middle.price
        else:
            last, high = middle, middle.price
    return first, last
