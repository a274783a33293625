"""The format of each tensor: least relative squared error for the bytes of the runtime's file.

The errors of all weights count alike in relative terms, since nothing but the weights is known: the damage of a tensor
is its squared error divided by its mean square, summed over its weights. A price for a byte decides all tensors at once
(`allocate`); tensors that the runtime joins are one choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pared.allocate import Options, fill, within_bytes
from pared.checkpoints.runtimes.roles import Weight
from pared.errors import ConfigError
from pared.files.threads import each
from pared.formats.dtypes import ELEMENTS, Array, as_floats, converted
from pared.formats.groups.grid import GroupGrid, Numbers
from pared.formats.groups.search import fitted, nearest
from pared.targets.alike import joined
from pared.targets.target import Offer, Target

_SAMPLE: Final = 1 << 15  # numbers of a tensor that show how large its errors are
_FEWEST: Final = 4  # rows of it

Format = Offer | None  # None: the tensor stays as it is


def rounded(matrix: Array, offer: Offer, threads: int = 1) -> dict[str, Numbers]:
    """A matrix in a format: the parts of its grid; of a floating type, its values."""
    if not isinstance(offer.grid, GroupGrid):
        return {"values": converted(matrix, ELEMENTS[offer.grid])}
    parts = fitted(matrix, offer.grid, threads=threads, negative=offer.negative, also=offer.also)
    return {"codes": nearest(matrix, offer.grid, parts), **parts}


def _relative_error(matrix: Array, offer: Format) -> float:
    """The mean squared error of a format, relative to the mean square of the numbers."""
    if offer is None:
        return 0.0
    parts = rounded(matrix, offer)
    values = offer.grid.decode(parts) if isinstance(offer.grid, GroupGrid) else as_floats(parts["values"])
    exact = as_floats(matrix)
    energy = float(np.sum(np.square(exact, dtype=np.float64)))
    lost = float(np.sum(np.square(exact - values, dtype=np.float64)))
    return lost / energy if energy else 0.0


def sample_of(matrix: Array) -> Array:
    """Rows of a matrix, evenly spaced, with about as many numbers as are needed; whole, since groups are."""
    count = min(len(matrix), max(_FEWEST, _SAMPLE // matrix.shape[1]))
    rows: Array = matrix[np.unique(np.linspace(0, len(matrix) - 1, count).astype(int))]
    return rows


@dataclass(frozen=True, eq=False)
class Unit:
    """Weights that get one format together.

    Args:
        weights: their places among all weights.
        formats: what they may become, from fine to coarse.
        options: what each of these costs.
    """

    weights: tuple[int, ...]
    formats: tuple[Format, ...]
    options: Options


def units_of(weights: Sequence[Weight], target: Target, sample: Callable[[Weight], Array]) -> list[Unit]:
    """What there is to choose, with the errors of samples.

    Args:
        weights: all that will be written.
        target: the runtime.
        sample: gives some rows of a weight's matrix.
    """
    members: dict[object, list[int]] = {}
    for i, weight in enumerate(weights):
        key = joined(weight.kept.name, target.alike) if weight.role == "linear" else None
        members.setdefault(i if key is None else key, []).append(i)
    groups = [tuple(group) for group in members.values()]
    formats = [_formats([weights[i] for i in group], target) for group in groups]

    def measured(place: int) -> list[float]:
        found = [0.0] * len(formats[place])
        if formats[place] != (None,):
            for i in groups[place]:
                rows = sample(weights[i])
                for k, offer in enumerate(formats[place]):
                    found[k] += _relative_error(rows, offer) * math.prod(weights[i].kept.held.shape)
        return found

    damages = each(measured, range(len(groups)))
    return [
        Unit(
            group,
            kinds,
            Options(
                np.array([sum(nbytes_of(weights[i], kind) for i in group) for kind in kinds], float), np.array(damage)
            ),
        )
        for group, kinds, damage in zip(groups, formats, damages, strict=True)
    ]


def _formats(weights: Sequence[Weight], target: Target) -> tuple[Format, ...]:
    """What all of some weights may become; to stay as they are is always possible where there is no floating type."""
    if any(weight.role == "other" for weight in weights):
        return (None,)
    found = [offer for offer in target.offers if all(_takes(offer, weight) for weight in weights)]
    floats = any(not isinstance(offer.grid, GroupGrid) for offer in found)
    return tuple(found) if floats else (None, *found)


def _takes(offer: Offer, weight: Weight) -> bool:
    rows, columns = weight.matrix
    roles = [weight.role]
    if weight.role == "table" and len(weight.kept.names) > 1:  # the head is tied to it
        roles.append("head")
    return all(offer.takes(role, columns, rows) for role in roles)


def nbytes_of(weight: Weight, kind: Format) -> int:
    """The bytes of a weight in the runtime's file."""
    return weight.kept.held.nbytes if kind is None else kind.nbytes(*weight.matrix)


def formats_within(units: Sequence[Unit], nbytes: float, count: int, target: Target, asked: str) -> list[Format]:
    """The format of each weight, of least damage in as many bytes.

    Args:
        units: what there is to choose.
        nbytes: what all weights together may take.
        count: the number of weights' numbers, for the message.
        target: the runtime, for the message.
        asked: the name of the user's option, for the message.

    Raises:
        ConfigError: they do not fit.
    """
    options = [unit.options for unit in units]
    choice = within_bytes(options, nbytes)
    if choice.nbytes > nbytes:
        raise ConfigError(
            f"{target.name} needs at least {choice.nbytes:,.0f} bytes for these weights, "
            f"{math.ceil(8000 * choice.nbytes / count) / 1000:.3f} bits each on average, and {nbytes:,.0f} are left",
            where=asked,
            remedy=_why_large(units, target),
        )
    choice = fill(options, choice, nbytes)
    found: dict[int, Format] = {}
    for unit, k in zip(units, choice.options, strict=True):
        found |= dict.fromkeys(unit.weights, unit.formats[k])
    return [found[i] for i in range(len(found))]


def _why_large(units: Sequence[Unit], target: Target) -> str:
    fixed = sum(float(unit.options.nbytes[0]) for unit in units if unit.formats == (None,))
    return (
        f"Allow more: {fixed:,.0f} of these bytes are of tensors that {target.name} keeps in float, such as embeddings."
        if fixed
        else "Allow more; these are its coarsest formats."
    )
