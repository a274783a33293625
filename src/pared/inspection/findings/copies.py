"""Numbers that a file holds twice: unchanged, or once in float and once rounded."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np

from pared.formats.dtypes import FLOATING, Array
from pared.inspection.findings.content import Content, spread
from pared.inspection.findings.finding import Case, Cause
from pared.readers.listing import ListedTensor

Pair = tuple[ListedTensor, ListedTensor]

# By the type of the rounded copy: what it may have been rounded from.
_WIDER: Final = {
    **dict.fromkeys(("int8", "uint8", "qint8", "quint8"), FLOATING),
    **dict.fromkeys(("float16", "bfloat16"), ("float32", "float64")),
}
# The least squared correlation of a row with its rounded copy: 0.9999 and more at eight bits, 0.9 at four bits with a
# step for each group; unrelated rows have almost none.
_EXPLAINED: Final = 0.8
_HALF: Final = 2.0**-8  # the largest relative error of a number rounded or truncated to half precision
_ROWS, _COLUMNS = 8, 512  # the part of each tensor that is compared
_LEAST_COMPARED: Final = 64  # numbers: fewer may agree by chance
_LEAST_NBYTES: Final = 1 << 12  # of a tensor that may be a rounded copy
_NEARLY: Final = 0.8  # the share of a copy's bytes from which the rest counts too: small tensors are not compared

_ONCE: Final = "Let the modules share one tensor, or leave it out: register_buffer(..., persistent=False)."

_INPUT: Final = re.compile(r"(?i)embed|wte|tok|vocab|shared|lookup")
_OUTPUT: Final = re.compile(r"(?i)head|output|decoder|logits|proj|generator|classifier|embed")


def two_copies(case: Case) -> Iterator[Cause]:
    """A model in float beside the same model rounded to int8 or to half precision."""
    pairs = _rounded(case)
    if not pairs:
        yield from _named(case)
        return
    roots = {_roots(wide.name, narrow.name) for wide, narrow in pairs}
    exact = [pair for group in _equal(case) for pair in _between(group, roots)]
    redundant = _completed(case, list(dict.fromkeys(wide for wide, _ in (*pairs, *exact))), {wide for wide, _ in roots})
    nbytes = sum(map(case.stored, redundant))
    (wide, narrow), *others = sorted(roots)
    whole = not others and wide[-1] in "./"
    names = (f"{wide}*", f"{narrow}*") if whole else (pairs[0][0].name, pairs[0][1].name)
    types = "/".join(dict.fromkeys(held.dtype for _, held in pairs))
    again = f" and {len(exact)} in float again" if exact else ""
    evidence = f"the model is stored twice: {names[0]} in float; {names[1]} with {len(pairs)} tensors as {types}{again}"
    kept = {kept.held.name for kept in case.selection.kept}
    both = any(wide.name in kept and narrow.name in kept for wide, narrow in pairs)
    remedy = f"Save a state dict without {names[1]}, and compress that." if both else ""
    yield Cause(tuple(held.name for held in redundant), nbytes, evidence, remedy)


def _completed(case: Case, copies: list[ListedTensor], roots: set[str]) -> list[ListedTensor]:
    """All tensors below the copy's roots, if most of their bytes are known copies; otherwise only the known copies."""
    prefixes = tuple(root for root in roots if root[-1] in "./")
    below = [held for held in case.distinct if held.name.startswith(prefixes)]
    least = _NEARLY * sum(held.nbytes for held in below)
    return below if set(copies) <= set(below) and sum(held.nbytes for held in copies) >= least else copies


def untied(case: Case) -> Iterator[Cause]:
    """An embedding table and the output layer that share their weights, but are stored separately."""
    yield from _twice(case, "tied weights are stored for each owner", _are_tied)


def duplicate(case: Case) -> Iterator[Cause]:
    """Other tensors with equal numbers."""
    yield from _twice(case, "the same numbers are stored again", operator.is_not)


def _named(case: Case) -> Iterator[Cause]:
    """A second model that only names give away, such as the moving average of the first."""
    shared = {kept.held.storage for kept in case.selection.kept}
    places = {held.name: held.storage for held in case.distinct}
    copies = [left for left in case.selection.left_out if left.kind == "two-copies" and left.name in places]
    copies = [copy for copy in copies if places[copy.name] not in shared]
    reasons = "; ".join(dict.fromkeys(copy.because for copy in copies))
    yield Cause(tuple(copy.name for copy in copies), sum(copy.nbytes for copy in copies), reasons)


def _twice(case: Case, words: str, belongs: Callable[[ListedTensor, ListedTensor], bool]) -> Iterator[Cause]:
    pairs = [(group[0], other) for group in _equal(case) for other in group[1:] if belongs(group[0], other)]
    for remedy, weights in (("", True), (_ONCE, False)):
        # `pared compress` stores a float tensor of two or more dimensions once if it is there twice.
        alike = [(a, b) for a, b in pairs if (a.dtype in FLOATING and len(a.shape) > 1) == weights]
        shown = "; ".join(f"{other.name} = {first.name}" for first, other in alike[:2])
        more = f"; and {len(alike) - 2} more" if alike[2:] else ""
        names = tuple(other.name for _, other in alike)
        yield Cause(names, sum(case.stored(other) for _, other in alike), f"{words}: {shown}{more}", remedy)


def _are_tied(first: ListedTensor, other: ListedTensor) -> bool:
    names = first.name, other.name
    return len(first.shape) == 2 and any(
        _INPUT.search(one) is not None and _OUTPUT.search(two) is not None for one, two in (names, names[::-1])
    )


def _equal(case: Case) -> list[list[ListedTensor]]:
    """Groups of equal tensors that no finding is about yet, in the order of the file."""
    groups = [[held for held in group if held.name not in case.explained] for group in case.equal]
    return [group for group in groups if len(group) > 1]


def _between(group: Sequence[ListedTensor], roots: set[tuple[str, str]]) -> Iterator[Pair]:
    """The pairs of equal tensors of which one belongs to the float model and one to the rounded one."""
    for one in group:
        for other in group:
            if one is not other and _roots(one.name, other.name) in roots:
                yield one, other


def _roots(one: str, other: str) -> tuple[str, str]:
    """The beginnings of two names, up to and including the first component that differs.

    >>> _roots("fp32_model.head.weight", "_model.head._packed_params/0")
    ('fp32_model.', '_model.')
    >>> _roots("net.fc.weight", "net.fc.weight_int8")
    ('net.fc.weight', 'net.fc.weight_int8')
    """
    parts = [re.findall(r"[^./]+[./]?", name) for name in (one, other)]
    same = next((i for i, (a, b) in enumerate(zip(*parts, strict=False)) if a != b), 0)
    return "".join(parts[0][: same + 1]), "".join(parts[1][: same + 1])


def _rounded(case: Case) -> list[Pair]:
    """Pairs of a float tensor and a rounded copy of it."""
    by_shape: dict[tuple[int, ...], list[ListedTensor]] = {}
    for held in case.distinct:
        if held.name not in case.explained and len(held.shape) > 1 and held.nbytes >= _LEAST_NBYTES:
            by_shape.setdefault(held.shape, []).append(held)
    pairs: list[Pair] = []
    for alike in by_shape.values():
        narrow = [held for held in alike if held.dtype in _WIDER]
        wide = [held for held in alike if any(held.dtype in _WIDER[other.dtype] for other in narrow)]
        if wide:
            with np.errstate(all="ignore"):  # NaN and overflow match nothing
                pairs += _matched(case.content, wide, narrow)
    return pairs


def _matched(content: Content, wide: list[ListedTensor], narrow: list[ListedTensor]) -> list[Pair]:
    signed = [[(held, _signature(content, held)) for held in side] for side in (wide, narrow)]
    floats, codes = ([(held, signature) for held, signature in side if signature is not None] for side in signed)
    if not floats or not codes:
        return []
    explained = np.square(np.stack([s for _, s in floats]) @ np.stack([s for _, s in codes]).T)
    pairs = []
    for j, (held, _) in enumerate(codes):
        i = int(np.argmax(explained[:, j]))
        original = floats[i][0]
        likely = original.dtype in _WIDER[held.dtype] and explained[i, j] >= _EXPLAINED
        if likely and _agrees(content, original, held):
            pairs.append((original, held))
    return pairs


def _signature(content: Content, held: ListedTensor) -> Array | None:
    """A unit vector made of a few rows, each centred and normalized; None if there are no numbers."""
    rows = _sample(content, held)
    if rows is None or rows.size < _LEAST_COMPARED:
        return None
    rows = rows - rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    flat = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0).ravel()
    unit: Array = flat / max(float(np.linalg.norm(flat)), 1.0)
    return unit.astype(np.float32) if np.isfinite(unit).all() else np.zeros(unit.shape, np.float32)


def _agrees(content: Content, wide: ListedTensor, narrow: ListedTensor) -> bool:
    """Whether half-precision numbers are exactly the rounded floats; those of an averaged model are only close."""
    if narrow.dtype not in FLOATING:
        return True
    floats, halves = _sample(content, wide), _sample(content, narrow)
    assert floats is not None
    assert halves is not None
    return bool((np.abs(floats - halves) <= _HALF * np.abs(floats) + 1e-7).all())


def _sample(content: Content, held: ListedTensor) -> Array | None:
    array = content.array(held)
    if array is None or 0 in held.shape:
        return None
    matrix = spread(array, _ROWS)
    matrix = spread(matrix.reshape(len(matrix), -1).T, _COLUMNS).T
    return matrix.astype(np.float64)
