"""What a finding is, and what the detectors work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from pared.checkpoints.selection import Selection, select
from pared.inspection.findings.content import Content
from pared.inspection.findings.traits import Seen, examine
from pared.readers.listing import ListedTensor, Listing

Depth = Literal["quick", "default", "deep"]

# Findings below this share of the file are not reported: nobody would notice the remedy.
WORTH_SHARE: Final = 0.01
# Nor are findings of fewer bytes: headers and padding are as large.
WORTH_NBYTES: Final = 1 << 14
# The numbers of tensors with fewer bytes are not examined. Vectors of zeros or ones (new biases, norms) are smaller;
# they are often equal, and nothing would be gained.
JUDGED_NBYTES: Final = 1 << 14

# Types that only quantization produces.
QUANTIZED: Final = ("qint8", "quint8", "quint4x2", "quint2x4")


@dataclass(frozen=True)
class Finding:
    """A reason why a file is larger than it should be, or less safe than it should be.

    Args:
        kind: one of `KINDS`.
        nbytes: the bytes concerned: those of the redundant copy, or of the tensors that are stored wastefully.
        names: the tensors, or other things in the file, that it is about; for copies, the redundant ones.
        evidence: what was seen, in one line.
        remedy: the command, or a sentence that says what to do.
        bytes_after: the size of the artifact that `pared compress` would write, if that is the remedy. It is the same
            for all findings of a file, because one run fixes them all. None for other remedies, and if only headers
            were read.
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
    """What a detector has found.

    Args:
        names: the tensors, or other things in the file, that it is about.
        nbytes: their bytes in the file.
        evidence: what was seen, in one line.
        remedy: a sentence; "" if the remedy is `pared compress`.
        always: whether to report it however small it is.
        explains: whether the detectors that follow skip these tensors.
    """

    names: tuple[str, ...]
    nbytes: int
    evidence: str
    remedy: str = ""
    always: bool = False
    explains: bool = True


def megabytes(nbytes: int) -> str:
    """Bytes in megabytes or kilobytes.

    >>> megabytes(10_528_344), megabytes(2048)
    ('10.5 MB', '2.0 KB')
    """
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} KB"


class Case:
    """A file under examination.

    Args:
        listing: what is in the file.
        content: reads its numbers.

    Attributes:
        explained: the names of the tensors that a finding is about already.
    """

    def __init__(self, listing: Listing, content: Content) -> None:
        self.listing = listing
        self.content = content
        self.explained: set[str] = set()

    @cached_property
    def selection(self) -> Selection:
        """Which tensors belong to the model, judged only by their names."""
        return select(self.listing, compare=False)

    @cached_property
    def seen(self) -> Mapping[str, Seen]:
        """What the numbers of the distinct tensors that are large enough to be examined show, by name."""
        return examine(self.content, [held for held in self.distinct if held.nbytes >= JUDGED_NBYTES])

    @cached_property
    def distinct(self) -> tuple[ListedTensor, ...]:
        """The tensors without those that are tied to an earlier one and so take no bytes of their own.

        The scales and zero points of a quantized tensor are part of it, and left out too.
        """
        quantized = {held.name for held in self.listing.tensors if held.dtype in QUANTIZED}
        places: dict[object, ListedTensor] = {}
        for held in self.listing.tensors:
            if held.storage is not None and held.nbytes and held.name.rpartition("/")[0] not in quantized:
                places.setdefault(held.place, held)
        return tuple(places.values())

    @cached_property
    def equal(self) -> list[list[ListedTensor]]:
        """Groups of tensors with the same numbers, in the order of the file; constant ones do not count as copies."""
        alike: dict[bytes, list[ListedTensor]] = {}
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

    def stored(self, held: ListedTensor) -> int:
        """The bytes of a tensor in the file: fewer than its numbers take where they are coded or expanded."""
        storage = self.listing.storages[held.storage or ""]
        return storage.nbytes if storage.coded else min(held.nbytes, storage.nbytes)

    def unexplained(self) -> list[Seen]:
        """What the tensors show that no finding is about yet."""
        return [seen for name, seen in self.seen.items() if name not in self.explained]
