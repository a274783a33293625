"""Match the tensors of two sources: by name, by name without what wrappers add, or by content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from pared.formats.dtypes import Array
from pared.inspection.comparison.metrics import Floats, as_numbers
from pared.inspection.comparison.sources import ReadableTensor
from pared.readers.naming import bare, holders

Layout = Literal["", "transposed", "reshaped"]


@dataclass(frozen=True, eq=False)
class Match:
    """Two tensors that correspond to each other.

    Args:
        a: the tensor of the first source.
        b: the tensor of the second source.
        layout: how `b` must be changed to have the shape of `a`.
        by: what matched: "name", or "content" if only the numbers did.
    """

    a: ReadableTensor
    b: ReadableTensor
    layout: Layout = ""
    by: Literal["name", "content"] = "name"


# Tensors are recognized by a sample of this many numbers, at the same places for all tensors of a shape.
_SAMPLE: Final = 1024
# The least correlation of matching tensors: about that of a two-bit code with its source.
_ALIKE: Final = 0.9
# Fewer numbers than this may correlate by chance: they must be equal.
_FEW: Final = 16


def pair(first: Sequence[ReadableTensor], second: Sequence[ReadableTensor]) -> list[Match]:
    """Match the tensors of two sources, each at most once; in the order of the first.

    Tensors with equal names are matched whatever they hold: the caller reports shapes that differ.
    """
    matches: list[Match] = []
    left = _Left(list(first), list(second), matches)
    left.match(lambda tensor: tensor.name)
    left.match(lambda tensor: bare(tensor.name))
    left.match(lambda tensor: bare(tensor.name), prefer=holders)
    found = -1
    while len(matches) > found and (prefix := _common_prefix(left.first, left.second)):
        found = len(matches)
        left.match(lambda tensor, prefix=prefix: bare(tensor.name).removeprefix(prefix))  # type: ignore[misc]  # bound
    left.match_contents(transposed=False)
    left.match_contents(transposed=True)
    order = {id(tensor): i for i, tensor in enumerate(first)}
    return sorted(matches, key=lambda match: order[id(match.a)])


@dataclass(eq=False)
class _Left:
    """The tensors without a match so far, and the matches."""

    first: list[ReadableTensor]
    second: list[ReadableTensor]
    matches: list[Match]

    def match(
        self, key: Callable[[ReadableTensor], str], prefer: Callable[[str], tuple[int, ...]] | None = None
    ) -> None:
        """Match tensors with equal keys that are unique in their sources, or preferred to the others there."""
        one, other = (_unique(tensors, key, prefer) for tensors in (self.first, self.second))
        self._take([Match(one[name], other[name]) for name in one.keys() & other.keys()])

    def match_contents(self, *, transposed: bool) -> None:
        """Match tensors with the same shape and similar numbers, the most similar first."""
        wanted = {tensor.shape for tensor in self.first if not transposed or len(tensor.shape) == 2}
        waiting: dict[tuple[int, ...], list[tuple[ReadableTensor, Floats]]] = {shape: [] for shape in wanted}
        for tensor in self.second:
            shape = tensor.shape[::-1] if transposed else tensor.shape
            sample = _sample(tensor, transposed) if shape in wanted else None
            if sample is not None:
                waiting[shape].append((tensor, sample))
        found = [pair for tensor in self.first for pair in _alike(tensor, waiting.get(tensor.shape, ()))]
        taken: set[int] = set()
        chosen = []
        for _, a, b in sorted(found, key=lambda pair: -pair[0]):
            if not taken & {id(a), id(b)}:
                taken |= {id(a), id(b)}
                chosen.append(Match(a, b, "transposed" if transposed else "", "content"))
        self._take(chosen)

    def _take(self, matches: list[Match]) -> None:
        taken = {id(tensor) for match in matches for tensor in (match.a, match.b)}
        self.matches += matches
        self.first = [tensor for tensor in self.first if id(tensor) not in taken]
        self.second = [tensor for tensor in self.second if id(tensor) not in taken]


def _unique(
    tensors: Iterable[ReadableTensor],
    key: Callable[[ReadableTensor], str],
    prefer: Callable[[str], tuple[int, ...]] | None,
) -> dict[str, ReadableTensor]:
    """By key the tensor that alone has it; of several the one whose name comes first in the order of `prefer`."""
    by_name: dict[str, list[ReadableTensor]] = {}
    for tensor in tensors:
        by_name.setdefault(key(tensor), []).append(tensor)
    if prefer is not None:
        for name, found in by_name.items():
            ranks = [prefer(tensor.name) for tensor in found]
            by_name[name] = [tensor for tensor, rank in zip(found, ranks, strict=True) if rank == min(ranks)]
    return {name: found[0] for name, found in by_name.items() if len(found) == 1}


def _common_prefix(first: Sequence[ReadableTensor], second: Sequence[ReadableTensor]) -> str:
    """The prefix that one side has and the other lacks for the largest number of tensors; "" if there is none.

    A single tensor is enough only if a side has no others left.
    """
    votes: Counter[str] = Counter()
    for longer, shorter in ((first, second), (second, first)):
        shapes = {(bare(tensor.name), tensor.shape) for tensor in shorter}
        for tensor in longer:
            parts = bare(tensor.name).split(".")
            for i in range(1, len(parts)):
                if (".".join(parts[i:]), tensor.shape) in shapes:
                    votes[".".join(parts[:i]) + "."] += 1
    prefix, count = votes.most_common(1)[0] if votes else ("", 0)
    return prefix if count > 1 or count == min(len(first), len(second)) else ""


def _alike(
    a: ReadableTensor, candidates: Sequence[tuple[ReadableTensor, Floats]]
) -> Iterator[tuple[float, ReadableTensor, ReadableTensor]]:
    sample = _sample(a) if candidates else None
    if sample is None:
        return
    for b, other in candidates:
        score = correlation(sample, other)
        if score >= _ALIKE:
            yield score, a, b


def correlation(x: Floats, y: Floats) -> float:
    """The correlation of two samples. Samples that are small or constant give 1 if they are equal, else 0.

    >>> correlation(np.arange(20.0), 3 - np.arange(20.0)), correlation(np.ones(20), np.ones(20))
    (-1.0, 1.0)
    """
    if x.shape != y.shape:
        return 0.0
    if np.array_equal(x, y, equal_nan=True):
        return 1.0
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt(np.sum(x * x) * np.sum(y * y))
    if len(x) < _FEW or not (0 < norm < np.inf):
        return 0.0
    return float(np.sum(x * y) / norm)


def _sample(tensor: ReadableTensor, transposed: bool = False) -> Floats | None:
    array = tensor.read()
    if array is None:
        return None
    return sampled(array.T if transposed else array)


def sampled(array: Array) -> Floats:
    """A sample of an array as float64, taken at the same places for all arrays of a shape."""
    if array.size > _SAMPLE:
        places = np.random.default_rng(0).integers(array.size, size=_SAMPLE)
        array = array[np.unravel_index(places, array.shape)]
    return as_numbers(array).reshape(-1)


def layout_of(a: Array, b: Array) -> Layout | None:
    """How `b`, of another shape, holds the numbers of `a`; None if it does not."""
    if a.size != b.size:
        return None
    ways: dict[Layout, Array] = {"transposed": b.T, "reshaped": b}
    for layout, way in ways.items():
        if layout == "transposed" and (a.ndim != 2 or way.shape != a.shape):
            continue
        if correlation(sampled(a), sampled(way)) >= _ALIKE:
            return layout
    return None
