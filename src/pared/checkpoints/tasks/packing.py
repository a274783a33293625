"""Packing the tensors of a checkpoint: groups of them are tasks; their bytes go into the journal in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pared.artifact.index import Index
from pared.checkpoints.journal import Journal
from pared.checkpoints.packing import Fineness, PackedTensor
from pared.checkpoints.sampling import CONTAINER, SizeModel, pack_held
from pared.checkpoints.selection import Kept
from pared.executors.executor import Executor, Task
from pared.files.threads import each, usable_cores
from pared.readers.sent import SentListing
from pared.terminal import bytes_done

# With a size limit, the search aims at this share of the limit and accepts a file above the other share; after this
# many rounds any file below the limit is accepted, since with few and small tensors sizes jump.
_AIM: Final = 0.9985
_NEAR: Final = 0.995
_ROUNDS: Final = 3
_MOST_ROUNDS: Final = 64  # which nothing needs: what a journal may say
_LARGEST_LEVEL: Final = 1 << 12
# The memory that packing takes: bytes as such, and for each byte of the tensors.
_MEMORY: Final = 256 << 20
_TIMES: Final = 8


@dataclass(frozen=True)
class _Group:
    """Consecutive tensors that are packed together, and how finely."""

    kept: Sequence[Kept]
    targets: Sequence[Fineness]

    @property
    def nbytes(self) -> int:
        return sum(one.held.nbytes for one in self.kept)


@dataclass(frozen=True)
class _Pack:
    """Packs a group of a checkpoint's tensors; threads share them, or a large one."""

    source: SentListing

    def __call__(self, group: _Group) -> list[PackedTensor]:
        listing = self.source.listing
        if len(group.kept) == 1:
            return [pack_held(listing, group.kept[0], group.targets[0], usable_cores())]
        pairs = list(zip(group.kept, group.targets, strict=True))
        return each(lambda pair: pack_held(listing, *pair), pairs, [one.held.nbytes for one in group.kept])


class Work:
    """Packs the tensors of a checkpoint in order, into a journal."""

    def __init__(
        self, source: SentListing, kept: Sequence[Kept], journal: Journal, executor: Executor, quiet: bool
    ) -> None:
        self._listing = source.listing
        self._kept = kept
        self._journal = journal
        self._executor = executor
        self._quiet = quiet
        self._task = Task("packing tensors", _Pack(source), lambda group: _MEMORY + _TIMES * group.nbytes)

    def at_rate(self, bits: float) -> None:
        """Pack all tensors at this rate, in bits per weight."""
        if self._journal.plan is None:
            self._journal.begin({})
        self._do([Fineness(bits)] * len(self._kept))

    def within(self, nbytes: int) -> None:
        """Pack with the finest steps at which the file has at most `nbytes`, correcting estimates by real sizes."""
        prospect = SizeModel(self._listing, self._kept)
        plan = self._journal.plan
        if plan is None or not _is_plan(plan):
            plan = {"round": 1, "level": prospect.level_for(int(nbytes * _AIM), nbytes)}
            self._journal.begin(plan)
        while True:
            targets = prospect.targets(plan["level"])
            self._do(targets)
            taken = len(Index(tuple(self._journal.entries)).to_bytes()) + self._journal.end + CONTAINER
            if taken <= nbytes and (taken >= nbytes * _NEAR or plan["round"] >= _ROUNDS):
                return
            known = [
                entry.nbytes / guess if guess else 1.0
                for entry, guess in zip(self._journal.entries, prospect.payloads(targets), strict=True)
            ]
            aim = nbytes * _AIM ** (2 ** plan["round"])  # further below with each round, so that one is the last
            plan = {"round": plan["round"] + 1, "level": prospect.level_for(int(aim), nbytes, known)}
            self._journal.begin(plan)

    def _do(self, targets: Sequence[Fineness]) -> None:
        """Pack the tensors that the journal does not have yet."""
        done = len(self._journal.entries)
        total = sum(one.held.nbytes for one in self._kept)
        with bytes_done("compressing", total, quiet=self._quiet) as advance:
            advance(sum(one.held.nbytes for one in self._kept[:done]))
            groups = list(_groups(self._kept, targets, done, self._executor.share))
            for group, found in zip(groups, self._executor.map(self._task, groups), strict=True):
                for one, packed in zip(group.kept, found, strict=True):
                    self._journal.add(one, packed)
                    advance(one.held.nbytes)


def _is_plan(plan: Mapping[str, Any]) -> bool:
    """Whether a journal's plan is one of those that `Work.within` makes."""
    level, number = plan.get("level"), plan.get("round")
    known = isinstance(level, float | int) and abs(level) <= _LARGEST_LEVEL
    return known and type(number) is int and 1 <= number <= _MOST_ROUNDS


def _groups(kept: Sequence[Kept], targets: Sequence[Fineness], done: int, most: int) -> Iterator[_Group]:
    """Consecutive tensors of at most `most` bytes, from index `done` on; a larger one is alone."""
    start = done
    nbytes = 0
    for i in range(done, len(kept)):
        size = kept[i].held.nbytes
        if nbytes and nbytes + size > most:
            yield _Group(kept[start:i], targets[start:i])
            start, nbytes = i, 0
        nbytes += size
    if start < len(kept):
        yield _Group(kept[start:], targets[start:])
