"""The allocation: one price for a byte decides every tensor's step at once.

At a price λ (damage per byte) each tensor takes the option with the least `damage + λ * bytes` (Shoham and Gersho
1988). Whatever the options are, as λ rises the chosen bytes never grow and the damage never falls, and no other choice
has less damage in as few bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

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
    chosen = []
    nbytes = damage = 0.0
    for options in tensors:
        cost = options.damage + price * options.nbytes
        best = int(np.lexsort((options.nbytes, cost))[0])
        chosen.append(best)
        nbytes += float(options.nbytes[best])
        damage += float(options.damage[best])
    return Choice(price, tuple(chosen), nbytes, damage)


def within_bytes(tensors: Sequence[Options], nbytes: float) -> Choice:
    """The choice of least damage among those at a price that take at most `nbytes`; else the smallest choice."""
    low, high = ends(tensors)
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
    chosen = list(choice.options)
    left = nbytes - choice.nbytes
    while True:
        best = (0.0, -1, -1)  # damage saved per byte, tensor, option
        for i, (tensor, present) in enumerate(zip(tensors, chosen, strict=True)):
            more = tensor.nbytes - tensor.nbytes[present]
            saved = tensor.damage[present] - tensor.damage
            rates = np.where((more <= left) & (saved > 0), saved / np.maximum(more, 1e-9), 0.0)
            option = int(rates.argmax())
            best = max(best, (float(rates[option]), i, option))
        rate, i, option = best
        if rate <= 0:
            break
        left -= float(tensors[i].nbytes[option] - tensors[i].nbytes[chosen[i]])
        chosen[i] = option
    pairs = list(zip(tensors, chosen, strict=True))
    total = sum(float(tensor.nbytes[option]) for tensor, option in pairs)
    damage = sum(float(tensor.damage[option]) for tensor, option in pairs)
    return Choice(choice.price, tuple(chosen), total, damage)


def within_damage(tensors: Sequence[Options], damage: float) -> Choice:
    """The smallest choice among those at a price that do at most this damage; else the least damaging one."""
    low, high = ends(tensors)
    return _cross(tensors, low, high, lambda choice: choice.damage <= damage)[0]


def ends(tensors: Sequence[Options]) -> tuple[float, float]:
    """A price so low that every tensor takes its least damaging option, and one so high that it takes its smallest.

    >>> low, high = ends([Options(np.array([4.0, 2.0]), np.array([1.0, 5.0]))])
    >>> low < 2 < high
    True
    """
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
