"""Which tensors of two sources are the same one: by name, by name without what wrappers add, by content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from pared.formats.dtypes import Array
from pared.inspection.comparison.metrics import Floats, as_numbers
from pared.inspection.comparison.sources import Piece
from pared.readers.naming import bare

Layout = Literal["", "transposed", "reshaped"]


@dataclass(frozen=True, eq=False)
class Match:
    """Two tensors that are one.

    Args:
        a: of the first source.
        b: of the second.
        layout: what has to be done to `b` so that it has the shape of `a`.
        by: "name", or "content" where nothing but the numbers says so.
    """

    a: Piece
    b: Piece
    layout: Layout = ""
    by: Literal["name", "content"] = "name"


# Tensors are recognized by so many numbers, at places that are the same for all of a shape.
_SAMPLE: Final = 1024
# The least correlation of two tensors that are taken for one: that of a code of about two bits.
_ALIKE: Final = 0.9
# Fewer numbers correlate by chance: they must be equal.
_FEW: Final = 16


def pair(first: Sequence[Piece], second: Sequence[Piece]) -> list[Match]:
    """The tensors that both sources have, in the order of the first; none is in two matches.

    Those of equal names are matched whatever they hold: shapes that differ are for the caller to report.
    """
    matches: list[Match] = []
    left = _Left(list(first), list(second), matches)
    left.match(lambda piece: piece.name)
    left.match(lambda piece: bare(piece.name))
    found = -1
    while len(matches) > found and (prefix := _common_prefix(left.first, left.second)):
        found = len(matches)
        left.match(lambda piece, prefix=prefix: bare(piece.name).removeprefix(prefix))  # type: ignore[misc]  # bound now
    left.match_contents(transposed=False)
    left.match_contents(transposed=True)
    order = {id(piece): i for i, piece in enumerate(first)}
    return sorted(matches, key=lambda match: order[id(match.a)])


@dataclass(eq=False)
class _Left:
    """What has no counterpart yet, and what has."""

    first: list[Piece]
    second: list[Piece]
    matches: list[Match]

    def match(self, key: Callable[[Piece], str]) -> None:
        """Match what has the same name, where no other of its source has that."""
        one, other = (_unique(pieces, key) for pieces in (self.first, self.second))
        self._take([Match(one[name], other[name]) for name in one.keys() & other.keys()])

    def match_contents(self, *, transposed: bool) -> None:
        """Match what has the same shape and much the same numbers, the most alike first."""
        wanted = {piece.shape for piece in self.first if not transposed or len(piece.shape) == 2}
        waiting: dict[tuple[int, ...], list[tuple[Piece, Floats]]] = {shape: [] for shape in wanted}
        for piece in self.second:
            shape = piece.shape[::-1] if transposed else piece.shape
            sample = _sample(piece, transposed) if shape in wanted else None
            if sample is not None:
                waiting[shape].append((piece, sample))
        found = [pair for piece in self.first for pair in _alike(piece, waiting.get(piece.shape, ()))]
        taken: set[int] = set()
        chosen = []
        for _, a, b in sorted(found, key=lambda pair: -pair[0]):
            if not taken & {id(a), id(b)}:
                taken |= {id(a), id(b)}
                chosen.append(Match(a, b, "transposed" if transposed else "", "content"))
        self._take(chosen)

    def _take(self, matches: list[Match]) -> None:
        taken = {id(piece) for match in matches for piece in (match.a, match.b)}
        self.matches += matches
        self.first = [piece for piece in self.first if id(piece) not in taken]
        self.second = [piece for piece in self.second if id(piece) not in taken]


def _unique(pieces: Iterable[Piece], key: Callable[[Piece], str]) -> dict[str, Piece]:
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(key(piece), []).append(piece)
    return {name: found[0] for name, found in by_name.items() if len(found) == 1}


def _common_prefix(first: Sequence[Piece], second: Sequence[Piece]) -> str:
    """What stands before the names of one side and not of the other, for as many tensors as possible; "" if nothing.

    One tensor is enough only where it is all that a side has left.
    """
    votes: Counter[str] = Counter()
    for longer, shorter in ((first, second), (second, first)):
        shapes = {(bare(piece.name), piece.shape) for piece in shorter}
        for piece in longer:
            parts = bare(piece.name).split(".")
            for i in range(1, len(parts)):
                if (".".join(parts[i:]), piece.shape) in shapes:
                    votes[".".join(parts[:i]) + "."] += 1
    prefix, count = votes.most_common(1)[0] if votes else ("", 0)
    return prefix if count > 1 or count == min(len(first), len(second)) else ""


def _alike(a: Piece, candidates: Sequence[tuple[Piece, Floats]]) -> Iterator[tuple[float, Piece, Piece]]:
    sample = _sample(a) if candidates else None
    if sample is None:
        return
    for b, other in candidates:
        score = correlation(sample, other)
        if score >= _ALIKE:
            yield score, a, b


def correlation(x: Floats, y: Floats) -> float:
    """Of two samples; 1 or 0 where they are too few, or all the same, and so either equal or not.

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


def _sample(piece: Piece, transposed: bool = False) -> Floats | None:
    array = piece.read()
    if array is None:
        return None
    return sampled(array.T if transposed else array)


def sampled(array: Array) -> Floats:
    """Some numbers of an array: of two arrays of one shape, those at the same places."""
    if array.size > _SAMPLE:
        places = np.random.default_rng(0).integers(array.size, size=_SAMPLE)
        array = array[np.unravel_index(places, array.shape)]
    return as_numbers(array).reshape(-1)


def layout_of(a: Array, b: Array) -> Layout | None:
    """How a tensor of the same name but of another shape holds the same numbers; None if it does not.

    Args:
        a: the reference.
        b: the other.
    """
    if a.size != b.size:
        return None
    ways: dict[Layout, Array] = {"transposed": b.T, "reshaped": b}
    for layout, way in ways.items():
        if layout == "transposed" and (a.ndim != 2 or way.shape != a.shape):
            continue
        if correlation(sampled(a), sampled(way)) >= _ALIKE:
            return layout
    return None
