"""What came of a compression, for users."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from pared.artifact.beside.companions import Companions
from pared.checkpoints.selection import LeftOut
from pared.errors import printable

_SHOWN: Final = 5  # names in a line


@dataclass(frozen=True)
class Compressed:
    """The result of a compression.

    Args:
        path: where the artifact is; of several models, the folder with theirs.
        source_nbytes: the size of the files that were read.
        weight_nbytes: the size of the tensors that were compressed, in their own types.
        nbytes: the size of the artifact.
        seconds: the time it took.
        left_out: the tensors that the artifact does not hold under their own name.
        copied: the other files of the folder, copied to the artifact's directory.
        resumed: the number of tensors that an earlier, interrupted run had packed.
        not_copied: why other files of the folder were not copied, by relative path.
        about: what its user has to know about the source; "" if nothing.
        plain: entries of the checkpoint that hold no tensors, which the artifact does not hold either.
    """

    path: Path
    source_nbytes: int
    weight_nbytes: int
    nbytes: int
    seconds: float
    left_out: tuple[LeftOut, ...]
    copied: tuple[str, ...]
    resumed: int
    not_copied: Mapping[str, str] = field(default_factory=dict)
    about: str = ""
    plain: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What was left out and why, one line per reason; the files copied; sizes and time in the last line."""
        return "\n".join(map(printable, (*self._notes(), self._figures())))

    def _notes(self) -> Iterator[str]:
        reasons = Counter(left.because for left in self.left_out)
        for because, count in reasons.items():
            nbytes = sum(left.nbytes for left in self.left_out if left.because == because)
            name = next(left.name for left in self.left_out if left.because == because)
            which = name if count == 1 else f"{name} and {count - 1:,} more"
            yield f"left out: {which}, {nbytes:,} bytes: {because}"
        if self.plain:
            yield f"left out: {_shown(self.plain)}: no tensors, and only training or other programs need them"
        for because in dict.fromkeys(self.not_copied.values()):
            names = [name for name, why in self.not_copied.items() if why == because]
            yield f"not copied: {_shown(names)}: {because}"
        if self.about:
            yield self.about
        if self.copied:
            yield f"copied: {', '.join(self.copied)}"
        if self.resumed:
            yield f"resumed: {self.resumed:,} tensors were packed by an earlier run"

    def _figures(self) -> str:
        speed = self.weight_nbytes / 1e6 / max(self.seconds, 1e-3)
        return (
            f"{self.source_nbytes:,} -> {self.nbytes:,} bytes ({self.nbytes / max(1, self.source_nbytes):.3f}), "
            f"{self.seconds:.1f} s, {speed:.0f} MB/s: {self.path}"
        )


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def joined(parts: Mapping[str, Compressed], path: Path, beside: Companions) -> Compressed:
    """The result for a folder of several models.

    Args:
        parts: the result for each, by its folder.
        path: the folder that was written.
        beside: the files that were copied with them.
    """
    done = list(parts.values())
    left = [replace(one, name=f"{part}/{one.name}") for part, each in parts.items() for one in each.left_out]
    return Compressed(
        path,
        source_nbytes=sum(one.source_nbytes for one in done),
        weight_nbytes=sum(one.weight_nbytes for one in done),
        nbytes=sum(one.nbytes for one in done),
        seconds=sum(one.seconds for one in done),
        left_out=tuple(left),
        copied=beside.copied,
        resumed=sum(one.resumed for one in done),
        not_copied=beside.left,
        about="; ".join(f"{part}: {one.about}" for part, one in parts.items() if one.about),
        plain=tuple(f"{part}/{name}" for part, one in parts.items() for name in one.plain),
    )
