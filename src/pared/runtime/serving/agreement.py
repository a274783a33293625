"""Whether outputs are the same up to rounding, and what several calls show of a graph whose answers are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from pared.model.recorded import values
from pared.runtime.graphs.containers import Container, is_cache

# The share of the output's energy by which a graph and the modules may differ: joined operators round elsewhere, and
# a difference of one code grows as it passes through the layers.
TOLERANCE: Final = 1e-2

# A graph that differs by more than this share in any call is wrong. Between the two it is not sure: the logits of a
# single token may be small where all of them are shifted by the same, and then any rounding is much of their energy.
_WRONG: Final = 0.1
_MOST_CALLS: Final = 4  # after which a graph is right or wrong by the energies of all of them together

Difference = tuple[float, float]  # the energy of the difference of two tensors, and that of the second


def differences(found: object, expected: object) -> list[Difference] | None:
    """The differences of the float tensors of two outputs; None if these differ in anything else.

    >>> import torch
    >>> differences([torch.tensor([1.0, 2.0]), 3], [torch.tensor([1.0, 4.0]), 3])
    [(4.0, 17.0)]
    >>> differences(torch.ones(2), torch.ones(3)) is None
    True
    """
    ours, structure = tree_flatten(found)
    theirs, their_structure = tree_flatten(expected)
    if structure != their_structure:
        return None
    noted: list[Difference] = []

    def compared(a: Tensor, b: Tensor) -> bool:
        difference = _difference(a, b)
        if difference is not None:
            noted.append(difference)
        return difference is not None

    return noted if all(values.same(a, b, compared) for a, b in zip(ours, theirs, strict=True)) else None


def of_containers(ours: Container | None, theirs: Container) -> list[Difference] | None:
    """The differences of what a graph and the modules wrote to a cache; None if they differ in anything else."""
    if ours is None or ours.layout != theirs.layout:
        return None
    return differences(list(ours.tensors.values()), list(theirs.tensors.values()))


def agree(found: object, expected: object, tolerance: float = TOLERANCE) -> bool:
    """Whether two outputs are equal up to rounding: floats by their energy, everything else exactly.

    >>> import torch
    >>> agree([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.0001])]), agree(torch.ones(2), torch.ones(3))
    (True, False)
    """
    seen = differences(found, expected)
    return seen is not None and _within(seen, tolerance)


class Agreement:
    """What the calls of a graph so far show, in which the modules ran as well.

    Args:
        tolerance: the share of the energy, summed over these calls, by which they may differ.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._calls = 0
        self._sums: list[Difference] = []

    def verdict(self, parts: Sequence[Sequence[Difference] | None]) -> Literal["right", "unsure", "wrong"]:
        """Take in the differences of another call: of its output and of its caches, see `differences`."""
        if None in parts:
            return "wrong"
        seen = [one for part in parts if part for one in part]
        if self._calls and len(seen) != len(self._sums):
            return "wrong"
        before = self._sums or [(0.0, 0.0)] * len(seen)
        self._sums = [(a + c, b + d) for (a, b), (c, d) in zip(before, seen, strict=True)]
        self._calls += 1
        if _within(self._sums, self._tolerance):
            return "right"
        return "unsure" if self._calls < _MOST_CALLS and _within(seen, _WRONG) else "wrong"


def lost(found: object, exact: object) -> float:
    """The largest share of an output's energy by which two outputs of one structure differ; infinite for another.

    What is in a cache does not count: it is for the next call, whose output shows what it is worth.

    >>> import torch
    >>> lost([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 5.0])]) == 1 / 34
    True
    """
    all_ours, all_theirs = (tree_leaves(one, is_leaf=is_cache) for one in (found, exact))
    if len(all_ours) != len(all_theirs):
        return math.inf
    shares = [0.0]
    for ours, theirs in zip(all_ours, all_theirs, strict=True):
        if not isinstance(theirs, Tensor):
            continue
        if not isinstance(ours, Tensor) or ours.shape != theirs.shape:
            return math.inf
        if theirs.is_floating_point() and theirs.isfinite().all():
            error = float((ours.double() - theirs.double()).square().sum())
            shares.append(error and error / max(float(theirs.double().square().sum()), 1e-300))
    return max(math.inf if math.isnan(share) else share for share in shares)


def _within(seen: Sequence[Difference], share: float) -> bool:
    return all(error <= share * energy for error, energy in seen)


def _difference(found: Tensor, expected: Tensor) -> Difference | None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return None
    if not expected.is_floating_point():
        return (0.0, 0.0) if bool((found == expected).all()) else None
    finite = expected.isfinite()
    if not bool((finite == found.isfinite()).all()):
        return None
    ours, theirs = found[finite].double(), expected[finite].double()
    return float((ours - theirs).square().sum()), float(theirs.square().sum())
