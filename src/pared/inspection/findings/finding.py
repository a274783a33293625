"""What a finding is, and what a detector is given to find it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from pared.checkpoints.selection import Selection, select
from pared.inspection.findings.content import Content
from pared.inspection.findings.traits import Seen, examine
from pared.readers.listing import Held, Listing

Depth = Literal["quick", "default", "deep"]

# A finding is worth words only from such a share of the file on: below it, the cure would not be noticed.
WORTH_SHARE: Final = 0.01
# And from so many bytes on: a page or four, below which headers and padding are as large.
WORTH_NBYTES: Final = 1 << 14
# The numbers of a tensor are judged only from so many bytes on. Vectors of all zeros or all ones (fresh biases, norms)
# are smaller, are equal by chance, and would gain nobody anything.
JUDGED_NBYTES: Final = 1 << 14

# The types of tensors that only quantization makes.
QUANTIZED: Final = ("qint8", "quint8", "quint4x2", "quint2x4")


@dataclass(frozen=True)
class Finding:
    """A reason why a file is larger than it should be, or worse than it looks.

    Args:
        kind: which, one of `KINDS`.
        nbytes: what it takes in the file: of a copy, the bytes of the copy; of tensors stored wastefully, theirs.
        names: the tensors, or the other things, that it is about; of a copy, what is redundant.
        evidence: what was seen, in a line.
        remedy: the command, or in a sentence the act, that mends it.
        bytes_after: of the whole artifact that `pared compress` makes, where that is the remedy: the same for all
            findings of a file, since one run mends them all. None where the remedy is another one, and where nothing
            but headers was read.
    """

    kind: str
    nbytes: int
    names: tuple[str, ...]
    evidence: str
    remedy: str
    bytes_after: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The finding as plain data."""
        return {
            "kind": self.kind,
            "bytes": self.nbytes,
            "names": list(self.names),
            "evidence": self.evidence,
            "remedy": self.remedy,
            "bytes_after": self.bytes_after,
        }


@dataclass(frozen=True)
class Cause:
    """What a detector has seen.

    Args:
        names: what it is about.
        nbytes: what that takes in the file.
        evidence: in a line.
        remedy: in a sentence, where `pared compress` is none.
        always: whether it is worth words however small it is.
        explains: whether the detectors that follow need not look at the tensors.
    """

    names: tuple[str, ...]
    nbytes: int
    evidence: str
    remedy: str = ""
    always: bool = False
    explains: bool = True


def megabytes(nbytes: int) -> str:
    """Bytes for people.

    >>> megabytes(10_528_344), megabytes(2048)
    ('10.5 MB', '2.0 KB')
    """
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} KB"


class Case:
    """A file under examination: its listing, its numbers, and what has been explained already.

    Args:
        listing: of the file.
        content: gives its numbers.
    """

    def __init__(self, listing: Listing, content: Content) -> None:
        self.listing = listing
        self.content = content
        self.explained: set[str] = set()

    @cached_property
    def selection(self) -> Selection:
        """Which tensors are the model, told by names alone."""
        return select(self.listing, compare=False)

    @cached_property
    def seen(self) -> Mapping[str, Seen]:
        """What was seen in the numbers of every tensor of size, by name; one of each place in the file."""
        return examine(self.content, [held for held in self.distinct if held.nbytes >= JUDGED_NBYTES])

    @cached_property
    def distinct(self) -> tuple[Held, ...]:
        """The tensors, one for each place in the file, since tied ones take their bytes once.

        The scales and zero points of a quantized tensor stand below it, and belong to it.
        """
        quantized = {held.name for held in self.listing.tensors if held.dtype in QUANTIZED}
        places: dict[object, Held] = {}
        for held in self.listing.tensors:
            if held.storage is not None and held.nbytes and held.name.rpartition("/")[0] not in quantized:
                places.setdefault((held.storage, held.offset, held.shape, held.stride), held)
        return tuple(places.values())

    @cached_property
    def equal(self) -> list[list[Held]]:
        """Groups of tensors with the same numbers, in the file's order; constant ones are no copies of each other."""
        alike: dict[bytes, list[Held]] = {}
        for seen in self.seen.values():
            if not seen.constant:
                alike.setdefault(seen.mark, []).append(seen.held)
        groups = []
        for waiting in alike.values():
            while len(waiting) > 1:
                first, *others = waiting
                same = [other for other in others if self.content.same(first, other)]
                groups += [[first, *same]] if same else []
                waiting = [other for other in others if other not in same]
        return groups

    def stored(self, held: Held) -> int:
        """The bytes of a tensor in the file: of its numbers, unless the file has them coded, or once for many."""
        storage = self.listing.storages[held.storage or ""]
        return storage.nbytes if storage.coded else min(held.nbytes, storage.nbytes)

    def unexplained(self) -> list[Seen]:
        """What was seen in the tensors that no finding is about yet."""
        return [seen for name, seen in self.seen.items() if name not in self.explained]
