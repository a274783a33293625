"""Steps of groups as small whole multiples of steps that several groups share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from pared.formats.groups.grid import Floats, GroupGrid, Numbers, storable, storable_steps
from pared.formats.groups.solving import Best, Groups, fit_steps, laid_out, quotient, units

_TRIED: Final = 16  # of the largest multiples, for the group with the largest step
_ROUNDS: Final = 2  # multiples, then what is shared, then multiples again
_LARGEST: Final = 1e15  # units: far from every number, and its square is within float32


def share(groups: Groups, bests: Sequence[Best], grid: GroupGrid, unit: Floats, rows: int) -> dict[str, Numbers]:
    """The parts of a grid with nested steps.

    Args:
        groups: the numbers, in units.
        bests: the best steps, and least values, of each group on its own: to begin with, each in turn. What does least
            damage is kept. With more than one, the first is for numbers that are on such a grid already.
        grid: the grid.
        unit: a power of two for each group.
        rows: the number of rows that the groups are of.
    """
    found: _Shared | None = None
    for number, best in enumerate(bests):
        one = _Shared(groups, grid, unit, rows)
        one.begin(best, exact=number < len(bests) - 1)
        for _ in range(_ROUNDS):
            one.improve_multiples()
            one.improve_shared()
        one.improve_multiples()
        if found is not None:
            one.take(found)
        found = one
    assert found is not None
    return found.parts()


class _Shared:
    """What groups share, with the multiples of it. Sums are in float64, as units of groups differ."""

    def __init__(self, groups: Groups, grid: GroupGrid, unit: Floats, rows: int) -> None:
        self.groups, self.grid, self.unit, self.rows = groups, grid, unit.astype(np.float64), rows
        self.per_row = groups.count // rows
        self.lines = grid.zero == "least"
        self.codes = (0, grid.high - grid.low) if self.lines else (grid.low, grid.high)
        self.step = self.least = np.empty((0, 0), np.float32)  # (rows, shared)
        self.multiple = self.least_multiple = np.empty(0, np.float32)  # (groups,)

    def begin(self, best: Best, exact: bool) -> None:
        """Multiples that come near the best steps, then ones near the least values that are best with those steps."""
        self.step, self.multiple = self._divided(best.step * self.unit, best.curvature, exact)
        if not self.lines:
            return
        step = self._spread(self.step, self.multiple)
        self.groups.round(step, best.least, *self.codes)
        codes, numbers = self.groups.sums()
        least = quotient(numbers - step * codes, self.groups.mass)
        self.least, self.least_multiple = self._divided(least * self.unit, self.groups.mass, exact)

    def _divided(self, values: Any, curvature: Floats, exact: bool) -> tuple[Floats, Floats]:
        """Shared numbers, and multiples of them near to given values, whose squared errors have these weights."""
        low, high = self.grid.multiples
        by_row = np.asarray(values, np.float32).reshape(self.rows, self.per_row)
        numbers = laid_out(by_row, self.grid.nested)
        weights = laid_out(curvature.reshape(self.rows, self.per_row), self.grid.nested, edge=False)
        unit = units(numbers)
        found = Groups(numbers / unit, weights / max(float(weights.max()), 1e-30))
        farthest = np.take_along_axis(found.numbers, np.abs(found.numbers).argmax(0)[None], 0)[0]
        largest = [code for code in range(1, high + 1) if exact or code > high - _TRIED]
        tried = ((farthest / np.float32(code), np.zeros_like(farthest)) for code in (*largest, *([low] if low else [])))

        def rounded(shared: Floats) -> Floats:
            return storable_steps(shared * unit, self.grid.step) / unit

        best = fit_steps(found, tried, low, high, rounded)
        found.round(best.step, None, low, high)
        multiple = found.codes.T.reshape(self.rows, -1)[:, : self.per_row]
        return (best.step * unit).reshape(self.rows, -1), np.ascontiguousarray(multiple).reshape(-1)

    def _spread(self, shared: Floats, multiple: Floats) -> Floats:
        """Steps or least values of groups, in their units."""
        each_group = np.repeat(shared, min(self.grid.nested, self.per_row), axis=1)[:, : self.per_row].reshape(-1)
        # A group's unit may be far below the step that it shares.
        return np.asarray(np.clip(each_group * multiple / self.unit, -_LARGEST, _LARGEST), np.float32)

    def _error(self, step: Floats, least: Floats, multiple: Floats, least_multiple: Floats) -> Any:
        """The squared error of each group with its nearest codes, which stay in `groups`."""
        steps = self._spread(step, multiple)
        leasts = self._spread(least, least_multiple) if self.lines else None
        self.groups.round(steps, leasts, *self.codes)
        return self.groups.error(steps, leasts) * self.unit**2

    def improve_multiples(self) -> None:
        """Take neighbouring multiples where they do less damage."""
        low, high = self.grid.multiples
        error = self._error(self.step, self.least, self.multiple, self.least_multiple)
        changes = [(one, other) for one in (-1, 0, 1) for other in ((-1, 0, 1) if self.lines else (0,)) if one or other]
        first, second = self.multiple, self.least_multiple
        for change, other in changes:
            multiple = np.clip(first + change, low, high)
            least_multiple = np.clip(second + other, low, high)
            found = self._error(self.step, self.least, multiple, least_multiple)
            better = found < error
            error = np.where(better, found, error)
            self.multiple = np.where(better, multiple, self.multiple)
            if self.lines:
                self.least_multiple = np.where(better, least_multiple, self.least_multiple)

    def improve_shared(self) -> None:
        """Take what is best for the present codes and multiples, where the error falls."""
        error = self._sum(self._error(self.step, self.least, self.multiple, self.least_multiple))
        mixed, squares = (values.astype(np.float64) for values in self.groups.products())
        multiple = self.multiple.astype(np.float64)
        down, right = self._sum(multiple * multiple * squares), self._sum(multiple * mixed * self.unit)
        if not self.lines:
            step, least = storable_steps(quotient(right, down), self.grid.step), self.least
        else:
            codes, numbers = (values.astype(np.float64) for values in self.groups.sums())
            other = self.least_multiple.astype(np.float64)
            across, below = self._sum(multiple * other * codes), self._sum(other * other * self.groups.mass)
            bottom = self._sum(other * numbers * self.unit)
            determinant = down * below - across * across
            step = storable_steps(quotient(right * below - bottom * across, determinant), self.grid.step)
            least = storable(quotient(down * bottom - across * right, determinant), self.grid.step)
        better = self._sum(self._error(step, least, self.multiple, self.least_multiple)) < error
        self.step = np.where(better, step, self.step)
        if self.lines:
            self.least = np.where(better, least, self.least)

    def take(self, other: _Shared) -> None:
        """Take over what is no worse, for all groups that share it."""
        ours, theirs = (
            self._sum(self._error(one.step, one.least, one.multiple, one.least_multiple)) for one in (self, other)
        )
        better = theirs <= ours
        by_group = np.repeat(better, min(self.grid.nested, self.per_row), axis=1)[:, : self.per_row].reshape(-1)
        self.step = np.where(better, other.step, self.step)
        self.multiple = np.where(by_group, other.multiple, self.multiple)
        if self.lines:
            self.least = np.where(better, other.least, self.least)
            self.least_multiple = np.where(by_group, other.least_multiple, self.least_multiple)

    def _sum(self, values: Any) -> Any:
        """Sums over the groups that share a step: (rows, shared)."""
        by_row = values.reshape(self.rows, self.per_row)
        return np.add.reduceat(by_row, np.arange(0, self.per_row, self.grid.nested), axis=1)

    def parts(self) -> dict[str, Numbers]:
        """The parts but "codes"."""
        kind = np.int8 if self.grid.signed else np.uint8
        parts: dict[str, Numbers] = {
            "step": self.step,
            "multiple": self.multiple.astype(kind).reshape(self.rows, self.per_row),
        }
        if self.lines:
            parts["least"] = self.least
            parts["least multiple"] = self.least_multiple.astype(kind).reshape(self.rows, self.per_row)
        return parts
