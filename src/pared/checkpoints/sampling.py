"""The size of a compressed checkpoint, estimated from samples of its tensors; and the steps that meet a given size.

For a given size, every tensor's step is the same multiple of the root of its energy. This minimizes the sum of errors,
each as a share of its tensor's energy: n weights with step s have an error of n s^2 / 12 and take n (h - log2 s) bits,
so that n s^2 / energy must be proportional to n (docs/decisions/013-compress.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pared.artifact.index import Entry, Index
from pared.checkpoints.packing import INT8_BITS, Fineness, PackedTensor, entry_of, exact, goes_on_grid, pack
from pared.checkpoints.quantized.recognize import REMEDY, recognize, unrounded
from pared.checkpoints.rates import crossing
from pared.checkpoints.selection import Kept, select
from pared.errors import ConfigError
from pared.files.disk import forget
from pared.files.threads import each
from pared.formats.dtypes import Array
from pared.readers.listing import Listing

# The most and the fewest numbers sampled per tensor; and the most of all tensors together.
_MOST: Final = 1 << 18
_LEAST: Final = 1 << 14
_ALL: Final = 1 << 26
# An upper bound on the overhead of the torch container, in bytes.
CONTAINER: Final = 2048

# Steps relative to the root of a tensor's energy, as levels: from the finest of int16 to all weights at zero.
_OCTAVE: Final = 8  # levels per octave
_FINEST, _COARSEST = -26.0 * _OCTAVE, 6.0 * _OCTAVE
_TOLERANCE: Final = 0.0005  # bits per weight


@dataclass(frozen=True, eq=False)
class Sample:
    """Some rows of a tensor that goes on a grid.

    Args:
        part: a copy of these rows.
        weight: the size of the whole tensor divided by the size of `part`.
        size: the root of the tensor's energy (the sum of its squares), estimated; 1 if all numbers are zero.
    """

    part: Array
    weight: float
    size: float


def predict_nbytes(listing: Listing, bits: float = INT8_BITS) -> int:
    """Estimate the size in bytes of the `best_model.pt` that `compress` would write, reading about 1 GB at most.

    Raises:
        ModelError: a tensor holds NaN, or infinities that are not a mask.
        ConfigError: a tensor has an element type that an artifact cannot hold.
    """
    kept = unrounded(select(listing).kept, recognize(listing))
    return SizeModel(listing, kept).nbytes([Fineness(bits)] * len(kept))


class SizeModel:
    """Estimates the size of a compressed checkpoint from samples of its tensors."""

    def __init__(self, listing: Listing, kept: Sequence[Kept]) -> None:
        self._kept = kept
        most = min(_MOST, max(_LEAST, _ALL // max(1, len(kept))))
        sizes = [one.held.nbytes for one in kept]
        self._samples = each(lambda one: _sample(listing, one, most), kept, sizes)
        plain = [one for one, sample in zip(kept, self._samples, strict=True) if sample is None]
        self._plain = {one.name: pack_held(listing, one, Fineness()) for one in plain}

    def targets(self, level: float) -> list[Fineness]:
        """The step of each tensor: 2^(level / 8) times the root of its energy."""
        return [
            Fineness() if sample is None else Fineness(level=level + _OCTAVE * math.log2(sample.size))
            for sample in self._samples
        ]

    def payloads(self, targets: Sequence[Fineness]) -> list[float]:
        """The estimated size of each tensor's parts, in bytes."""
        packed = self._packed(targets)
        return [one.nbytes * self._weight(i) for i, one in enumerate(packed)]

    def nbytes(self, targets: Sequence[Fineness], known: Sequence[float] | None = None) -> int:
        """The estimated size of the whole file, in bytes.

        Args:
            targets: one for each tensor.
            known: for each tensor, a correction factor: its real size divided by the estimate; default: 1.
        """
        entries: list[Entry] = []
        for i, (one, packed) in enumerate(zip(self._kept, self._packed(targets), strict=True)):
            factor = self._weight(i) * (1.0 if known is None else known[i])
            entries.append(entry_of(one, packed, entries[-1].end if entries else 0, factor))
        return len(Index(tuple(entries)).to_bytes()) + (entries[-1].end if entries else 0) + CONTAINER

    def level_for(self, nbytes: int, most: int, known: Sequence[float] | None = None) -> float:
        """The level at which the file is estimated to have `nbytes`.

        Args:
            nbytes: the size aimed at.
            most: the user's limit, for the error message.
            known: correction factors, as for `nbytes`.

        Raises:
            ConfigError: the file cannot be that small.
        """
        if (least := self.nbytes(self.targets(_COARSEST), known)) > nbytes:
            raise ConfigError(
                f"{most:,} bytes are too few: with all weights at zero, the file would still have {least:,}",
                where="max_size",
                remedy="Allow a larger file; below one or two bits per weight no model is useful.",
            )
        if self.nbytes(self.targets(_FINEST), known) <= nbytes:
            return _FINEST
        elements = max(1, sum(math.prod(one.held.shape) for one in self._kept))
        unit = 8 / elements  # one byte, in bits per weight
        start = 2 - unit * nbytes - math.log2(elements / len(self._kept)) / 2
        rate = lambda level: unit * self.nbytes(self.targets(level), known)  # noqa: E731  # two lines would say less
        return crossing(rate, unit * nbytes, _OCTAVE * start, _TOLERANCE)

    def _weight(self, i: int) -> float:
        sample = self._samples[i]
        return 1.0 if sample is None else sample.weight

    def _packed(self, targets: Sequence[Fineness]) -> list[PackedTensor]:
        def one(i: int) -> PackedTensor:
            kept, sample = self._kept[i], self._samples[i]
            if sample is None:
                return self._plain[kept.name]
            return pack(sample.part, targets[i], kept.held.name)

        sizes = [0 if sample is None else sample.part.size for sample in self._samples]
        return each(one, range(len(sizes)), sizes)


def _sample(listing: Listing, kept: Kept, most: int) -> Sample | None:
    if kept.exact or not goes_on_grid(kept.held.dtype, kept.held.shape):
        return None
    array = array_of(listing, kept)
    part = _rows(array, most)
    if part is array:
        part = array.copy()
    release(listing, kept)
    weight = array.size / part.size
    with np.errstate(over="ignore", invalid="ignore"):  # a size that is not finite is replaced by 1
        size = math.sqrt(weight * float(np.sum(np.square(part.astype(np.float64)))))
    return Sample(part, weight, size if 0 < size < math.inf else 1.0)


def _rows(array: Array, most: int) -> Array:
    """Evenly spaced rows with about `most` numbers in total; only the beginnings of very long rows."""
    if array.size <= most:
        return array
    length = array.size // len(array)
    count = min(len(array), max(8, most // length))
    rows: Array = array[np.unique(np.linspace(0, len(array) - 1, count).astype(int))]
    if rows.size <= 2 * most:
        return rows
    beginnings: Array = rows.reshape(len(rows), -1)[:, : most // len(rows)]
    return beginnings


def array_of(listing: Listing, kept: Kept) -> Array:
    """The numbers of a tensor.

    Raises:
        ConfigError: the file stores them in a form that cannot be read.
    """
    array = listing.array(kept.held)
    if array is None:
        raise unsupported(kept)
    return array


def unsupported(kept: Kept) -> ConfigError:
    """The error for a tensor whose element type an artifact cannot hold."""
    if kept.exact:
        return ConfigError(
            f"is of type {kept.held.dtype}, which an artifact cannot hold: {kept.exact}",
            where=kept.held.name,
            remedy=REMEDY,
        )
    return ConfigError(
        f"is of type {kept.held.dtype}, which an artifact cannot hold",
        where=kept.held.name,
        remedy="Convert the checkpoint to float32, float16 or bfloat16 first, or compress its own source.",
    )


def pack_held(listing: Listing, kept: Kept, target: Fineness, threads: int = 1) -> PackedTensor:
    """Pack a tensor of a file, and release the memory of what was read."""
    array = array_of(listing, kept)
    packed = exact(array, kept.exact) if kept.exact else pack(array, target, kept.held.name, threads)
    release(listing, kept)
    return packed


def release(listing: Listing, kept: Kept) -> None:
    """Release the pages of a mapped file that hold a tensor."""
    storage = listing.storages[kept.held.storage or ""]
    if storage.content is not None and not storage.coded:
        content = storage.content()
        forget(content[kept.held.offset : kept.held.offset + kept.held.nbytes] if kept.held.stride is None else content)
