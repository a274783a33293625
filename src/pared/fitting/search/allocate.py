"""The allocation: one price for a byte decides every tensor's step at once.

At a price λ (damage per byte) each tensor takes the option with the least `damage + λ * bytes` (Shoham and Gersho
1988). Whatever the options are, the bytes of what is chosen never grow with λ and the damage never falls, and no
other choice has less damage in as few bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

# Prices are searched to this relative width: choices are discrete, and closer ones are alike.
_CLOSE: Final = 1e-9


@dataclass(frozen=True, eq=False)
class Options:
    """What one tensor could be.

    Args:
        nbytes: float64, of each option.
        damage: float64, of each option.
    """

    nbytes: NDArray[np.float64]
    damage: NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """What is chosen at one price.

    Args:
        price: λ, damage per byte.
        options: the index of each tensor's option.
        nbytes: in all.
        damage: in all.
    """

    price: float
    options: tuple[int, ...]
    nbytes: float
    damage: float


def choose(tensors: Sequence[Options], price: float) -> Choice:
    """The best option of each tensor at a price; of equals, the smaller.

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
    """The least damage among the choices at a price that take at most so many bytes; else the smallest choice."""
    low, high = ends(tensors)
    return _cross(tensors, low, high, lambda choice: choice.nbytes > nbytes)[1]


def fill(tensors: Sequence[Options], choice: Choice, nbytes: float) -> Choice:
    """Spend what bytes are left: the options that win most damage per byte, as long as one fits.

    >>> tensors = [Options(np.array([9.0, 5.0, 2.0]), np.array([0.0, 3.0, 4.0]))]
    >>> fill(tensors, choose(tensors, 10.0), 6.0).options
    (1,)
    """
    chosen = list(choice.options)
    left = nbytes - choice.nbytes
    while True:
        best = (0.0, -1, -1)
        for i, (tensor, now) in enumerate(zip(tensors, chosen, strict=True)):
            more = tensor.nbytes - tensor.nbytes[now]
            won = tensor.damage[now] - tensor.damage
            rates = np.where((more <= left) & (won > 0), won / np.maximum(more, 1e-9), 0.0)
            option = int(rates.argmax())
            best = max(best, (float(rates[option]), i, option))
        gain, i, option = best
        if gain <= 0:
            break
        left -= float(tensors[i].nbytes[option] - tensors[i].nbytes[chosen[i]])
        chosen[i] = option
    pairs = list(zip(tensors, chosen, strict=True))
    spent = sum(float(t.nbytes[o]) for t, o in pairs)
    return Choice(choice.price, tuple(chosen), spent, sum(float(t.damage[o]) for t, o in pairs))


def within_damage(tensors: Sequence[Options], damage: float) -> Choice:
    """The fewest bytes among the choices at a price that do at most so much damage; else the least damaging."""
    low, high = ends(tensors)
    return _cross(tensors, low, high, lambda choice: choice.damage <= damage)[0]


def ends(tensors: Sequence[Options]) -> tuple[float, float]:
    """Prices at which every tensor takes its least damaging option, and its smallest.

    >>> low, high = ends([Options(np.array([4.0, 2.0]), np.array([1.0, 5.0]))])
    >>> low < 2 < high
    True
    """
    gains = [np.ptp(t.damage) for t in tensors if np.ptp(t.damage) > 0]
    sizes = [np.ptp(t.nbytes) for t in tensors if np.ptp(t.nbytes) > 0]
    if not gains or not sizes:
        return 1.0, 1.0
    steps = [
        _least_step(t.damage) / float(np.ptp(t.nbytes)) for t in tensors if np.ptp(t.damage) * np.ptp(t.nbytes) > 0
    ]
    falls = [
        float(np.ptp(t.damage)) / _least_step(t.nbytes) for t in tensors if np.ptp(t.damage) * np.ptp(t.nbytes) > 0
    ]
    return min(steps, default=1.0) / 2, max(falls, default=1.0) * 2


def _least_step(values: NDArray[np.float64]) -> float:
    """The least difference between two values that differ."""
    return float(np.diff(np.unique(values)).min())


def _cross(
    tensors: Sequence[Options], low: float, high: float, before: Callable[[Choice], bool]
) -> tuple[Choice, Choice]:
    """The last choice for which `before` holds and the first for which it does not, as the price rises.

    Where it holds at neither end, or at both, the two are the same end.
    """
    first, last = choose(tensors, low), choose(tensors, high)
    if not before(first):
        return first, first
    if before(last):
        return last, last
    while high / low > 1 + _CLOSE:
        middle = choose(tensors, math.sqrt(low * high))
        if before(middle):
            first, low = middle, middle.price
        else:
            last, high = middle, middle.price
    return first, last
