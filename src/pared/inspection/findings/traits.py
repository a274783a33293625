"""What the numbers of a tensor show. Each tensor is read once, in one of several threads, for all questions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pared.files import threads
from pared.formats.dtypes import FLOATING, Array
from pared.inspection.findings.content import Content, spread
from pared.inspection.findings.levels import grid_of
from pared.readers.listing import ListedTensor

# The least share of zeros of a sparse tensor; the most common pattern, two of four, has exactly half.
_SPARSE: Final = 0.5
_CHUNK: Final = 1 << 20  # elements examined at a time
_MARKED: Final = 64  # places of a tensor that go into its mark
_MARKED_NBYTES: Final = 1024  # bytes at each


@dataclass(frozen=True)
class Trait:
    """Why a tensor takes more bytes than its numbers need: the kind of finding, and what was seen, in a few words."""

    kind: str
    detail: str


@dataclass(frozen=True)
class Seen:
    """What the numbers of a tensor show.

    Args:
        held: the tensor.
        mark: a hash that tensors of the same type, shape and numbers share, and others hardly ever.
        trait: the first that applies, in the order of `_TRAITS`; None for a tensor that is as it should be.
    """

    held: ListedTensor
    mark: bytes
    trait: Trait | None

    @property
    def constant(self) -> bool:
        """Whether all numbers are equal."""
        return self.trait is not None and self.trait.detail == _CONSTANT.detail


def examine(content: Content, tensors: Sequence[ListedTensor]) -> Mapping[str, Seen]:
    """Examine tensors; the result is by name, without those whose numbers cannot be read."""
    examined = threads.each(lambda held: _examine(content, held), tensors, [held.nbytes for held in tensors])
    return {seen.held.name: seen for seen in examined if seen is not None}


def _examine(content: Content, held: ListedTensor) -> Seen | None:
    array = content.array(held)
    if array is None:
        return None
    rows = content.rows(held)
    assert rows is not None
    with np.errstate(all="ignore"):  # NaN and overflow answer every question with no
        trait = next(filter(None, (ask(rows, held.dtype) for ask in _TRAITS)), None)
    return Seen(held, _mark(array, held), trait)


def _mark(array: Array, held: ListedTensor) -> bytes:
    """A hash of the type, the shape, and bytes at evenly spaced places."""
    digest = hashlib.blake2b(f"{held.dtype} {held.shape}".encode(), digest_size=16)
    if array.flags.c_contiguous:
        raw = array.reshape(-1).view(np.uint8)
        whole = raw[: len(raw) // _MARKED_NBYTES * _MARKED_NBYTES].reshape(-1, _MARKED_NBYTES)
        digest.update(np.ascontiguousarray(spread(whole, _MARKED)).tobytes())
        digest.update(raw[-_MARKED_NBYTES:].tobytes())
    else:
        digest.update(np.ascontiguousarray(spread(array, _MARKED)).tobytes())
    return digest.digest()


_CONSTANT: Final = Trait("zeros", "all numbers equal")


def _constant(array: Array, _: str) -> Trait | None:
    first = array.reshape(-1)[:1]
    return _CONSTANT if _all(array, lambda part: bool((part == first).all())) else None


def _on_grid(array: Array, dtype: str) -> Trait | None:
    grid = grid_of(array, dtype) if dtype in FLOATING and array.ndim > 1 and array.size else None
    return None if grid is None else Trait("fake-quantized", str(grid))


def _sparse(array: Array, dtype: str) -> Trait | None:
    if dtype not in (*FLOATING, "bool"):  # codes of a few bits are often 0, as they should be
        return None
    flat = array.reshape(-1)
    tried = spread(flat, 4096)
    if np.count_nonzero(tried) > (1 - _SPARSE) * len(tried) * 1.1:
        return None
    zeros = len(flat) - sum(int(np.count_nonzero(part)) for part in _parts(flat))
    return Trait("zeros", f"{100 * zeros / len(flat):.0f} % zeros") if zeros >= _SPARSE * len(flat) else None


def _wide_float(array: Array, dtype: str) -> Trait | None:
    if dtype != "float32":
        return None
    for half, lossless in (
        ("bfloat16", lambda part: not (part.view(np.uint32) & 0xFFFF).any()),
        ("float16", lambda part: bool((part.astype(np.float16).astype(np.float32) == part).all())),
    ):
        if _all(array, lossless):
            return Trait("wide-float", f"every number fits {half} exactly")
    return None


def _wide_int(array: Array, dtype: str) -> Trait | None:
    if dtype not in ("int64", "int32", "uint64", "uint32"):
        return None
    for narrow in ("uint8", "int8", "int16", "int32"):
        limits = np.iinfo(narrow)
        if limits.bits < array.itemsize * 8 and _all(
            array,
            lambda part, limits=limits: bool(part.min() >= limits.min and part.max() <= limits.max),  # type: ignore[misc]  # bound now
        ):
            return Trait("wide-int", f"every number fits {narrow}")
    return None


# The questions about each tensor, in this order: the first that applies decides.
_TRAITS: Final[tuple[Callable[[Array, str], Trait | None], ...]] = (
    _constant, _on_grid, _sparse, _wide_float, _wide_int,
)  # fmt: skip


def _parts(array: Array) -> list[Array]:
    flat = array.reshape(-1)
    return [flat[start : start + _CHUNK] for start in range(0, len(flat), _CHUNK)]


def _all(array: Array, holds: Callable[[Array], bool]) -> bool:
    """Whether something holds for every part of an array; a few evenly spaced numbers are tested first."""
    flat = array.reshape(-1)
    return holds(spread(flat, 1024)) and all(holds(part) for part in _parts(flat))
