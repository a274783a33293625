"""What a compressed checkpoint will take, judged by rows of its tensors; and the steps that make it as large as asked.

Where a size is given, every tensor's step is the same multiple of the root of its energy. Of all ways to that size it
has the least sum of errors, each as a share of its tensor's energy: n weights with a step s have errors of n s^2 / 12
and take n (h - log2 s) bits, so that n s^2 / energy and n have to be in proportion (docs/decisions/013-compress.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from pared.artifact.index import Entry, Index
from pared.checkpoints.packing import INT8_BITS, Fineness, PackedTensor, entry_of, goes_on_grid, pack
from pared.checkpoints.rates import crossing
from pared.checkpoints.selection import Kept, select
from pared.errors import ConfigError
from pared.files.disk import forget
from pared.files.threads import each
from pared.formats.dtypes import Array
from pared.readers.listing import Listing

# So many numbers of each tensor are looked at; fewer where there are many tensors.
_MOST: Final = 1 << 18
_LEAST: Final = 1 << 14
_ALL: Final = 1 << 26
# What the torch container takes beside its records, at most.
CONTAINER: Final = 2048

# A step as a multiple of the root of a tensor's energy, as a level: from the finest of int16 to all weights at zero.
_OCTAVE: Final = 8  # levels
_FINEST, _COARSEST = -26.0 * _OCTAVE, 6.0 * _OCTAVE
_TOLERANCE: Final = 0.0005  # bits for each weight


@dataclass(frozen=True, eq=False)
class Sample:
    """Some rows of a tensor that goes on a grid.

    Args:
        part: a copy of them.
        weight: how many times their number the tensor's is.
        size: the root of the tensor's energy, the sum of its squares; 1 where all are zero.
    """

    part: Array
    weight: float
    size: float


def predict_nbytes(listing: Listing, bits: float = INT8_BITS) -> int:
    """About the bytes of the `best_model.pt` that `compress` would write; at most about a gigabyte is read.

    Args:
        listing: of the file or folder; open.
        bits: for each weight.

    Raises:
        ModelError: a tensor holds NaN, or infinities that are no mask.
        ConfigError: a tensor is of a type that an artifact cannot hold.
    """
    kept = select(listing).kept
    return SizeModel(listing, kept).nbytes([Fineness(bits)] * len(kept))


class SizeModel:
    """The tensors of a checkpoint, as far as samples tell.

    Args:
        listing: of the source; open.
        kept: its tensors.
    """

    def __init__(self, listing: Listing, kept: Sequence[Kept]) -> None:
        self._kept = kept
        most = min(_MOST, max(_LEAST, _ALL // max(1, len(kept))))
        sizes = [one.held.nbytes for one in kept]
        self._samples = each(lambda one: _sample(listing, one, most), kept, sizes)
        plain = [one for one, sample in zip(kept, self._samples, strict=True) if sample is None]
        self._plain = {one.name: pack_held(listing, one, Fineness()) for one in plain}

    def targets(self, level: float) -> list[Fineness]:
        """Steps of 2^(level / 8) times the root of each tensor's energy."""
        return [
            Fineness() if sample is None else Fineness(level=level + _OCTAVE * math.log2(sample.size))
            for sample in self._samples
        ]

    def payloads(self, targets: Sequence[Fineness]) -> list[float]:
        """About the bytes of the parts of each tensor."""
        packed = self._packed(targets)
        return [one.nbytes * self._weight(i) for i, one in enumerate(packed)]

    def nbytes(self, targets: Sequence[Fineness], known: Sequence[float] | None = None) -> int:
        """About the bytes of the whole file.

        Args:
            targets: for each tensor.
            known: by how much the sample of each tensor is known to mislead.
        """
        entries: list[Entry] = []
        for i, (one, packed) in enumerate(zip(self._kept, self._packed(targets), strict=True)):
            factor = self._weight(i) * (1.0 if known is None else known[i])
            entries.append(entry_of(one, packed, entries[-1].end if entries else 0, factor))
        return len(Index(tuple(entries)).to_bytes()) + (entries[-1].end if entries else 0) + CONTAINER

    def level_for(self, nbytes: int, most: int, known: Sequence[float] | None = None) -> float:
        """The level at which the file takes about so many bytes.

        Args:
            nbytes: that are aimed at.
            most: that are asked for.
            known: as for `nbytes`.

        Raises:
            ConfigError: it cannot be so small.
        """
        if (least := self.nbytes(self.targets(_COARSEST), known)) > nbytes:
            raise ConfigError(
                f"{most:,} bytes are too few: with all weights at zero, the file would still have {least:,}",
                where="max_size",
                remedy="Ask for more; at less than a bit or two for each weight, no model is of use.",
            )
        if self.nbytes(self.targets(_FINEST), known) <= nbytes:
            return _FINEST
        elements = max(1, sum(math.prod(one.held.shape) for one in self._kept))
        unit = 8 / elements  # a byte, in bits for each weight
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
    if not goes_on_grid(kept.held.dtype, kept.held.shape):
        return None
    array = array_of(listing, kept)
    part = _rows(array, most)
    if part is array:
        part = array.copy()
    release(listing, kept)
    weight = array.size / part.size
    with np.errstate(over="ignore", invalid="ignore"):  # a size that is no finite number decides no step
        size = math.sqrt(weight * float(np.sum(np.square(part.astype(np.float64)))))
    return Sample(part, weight, size if 0 < size < math.inf else 1.0)


def _rows(array: Array, most: int) -> Array:
    """Evenly spaced rows, of so many numbers; of rows too long for that, the beginnings."""
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
        ConfigError: the file has them in a form that an artifact cannot hold.
    """
    array = listing.array(kept.held)
    if array is None:
        raise unsupported(kept)
    return array


def unsupported(kept: Kept) -> ConfigError:
    """The error for a tensor of a type that an artifact has no word for."""
    return ConfigError(
        f"is of type {kept.held.dtype}, which an artifact cannot hold",
        where=kept.held.name,
        remedy="Convert the checkpoint to float32, float16 or bfloat16 first, or compress the one it was made from.",
    )


def pack_held(listing: Listing, kept: Kept, target: Fineness, threads: int = 1) -> PackedTensor:
    """A tensor of a file, packed; what was read of the file is given back."""
    packed = pack(array_of(listing, kept), target, kept.held.name, threads)
    release(listing, kept)
    return packed


def release(listing: Listing, kept: Kept) -> None:
    """Give back the memory of what was read of a mapped file."""
    storage = listing.storages[kept.held.storage or ""]
    if storage.content is not None and not storage.coded:
        content = storage.content()
        forget(content[kept.held.offset : kept.held.offset + kept.held.nbytes] if kept.held.stride is None else content)
