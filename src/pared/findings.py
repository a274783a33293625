"""Why a file is larger than it should be, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One reason for bytes that need not be there.

    Args:
        kind: its short name: "two-copies", "wide-float" ...
        nbytes: how many bytes are concerned.
        names: the tensors, or other rows of the ledger, that are concerned.
        evidence: what was seen in the file, in a sentence.
        remedy: what to do, a command where there is one.
        bytes_after: the file's bytes after the remedy; None where it has no bearing on them.
    """

    kind: str
    nbytes: int
    names: tuple[str, ...]
    evidence: str
    remedy: str
    bytes_after: int | None
