"""Artifacts of any damage or size, put together on the disk: what a search works with where no model fits in memory."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from torch import nn

from pared import allocate
from pared.allocate import Choice
from pared.artifact.outcome import Outcome
from pared.errors import ConfigError
from pared.executors.executor import Executor
from pared.executors.sendable import sendable
from pared.files.disk import make_directory, write_atomic
from pared.fitting.records.fingerprint import damaged, read_object
from pared.fitting.search.closing import closed_in
from pared.fitting.search.compressor import RESERVE
from pared.fitting.search.free.choices import completing
from pared.fitting.search.free.free import Free, name_of
from pared.fitting.search.free.units import beside_nbytes
from pared.fitting.search.maker import OperatingPoint
from pared.fitting.streamed.deciding.coding import Assembly, CodedFile
from pared.fitting.streamed.deciding.opening import ByBlock, CodedNumbers, Loaded
from pared.fitting.streamed.deciding.rounding import Rounder, Rounding
from pared.fitting.streamed.deciding.spilled import Traced, bare, counted, read_traced
from pared.fitting.streamed.parts.blocks import ModelBlocks
from pared.fitting.streamed.parts.weights import Weights
from pared.fitting.streamed.store import FIXED, Store
from pared.model.contents import Decision
from pared.model.state import tables
from pared.targets.target import Target

_ENTRY: Final = 48  # bytes of an entry in a compressed index (an estimate, corrected by the first round)
_CHOICE: Final = "choice.json"
_DIGITS: Final = 8  # bytes of the name of an artifact that is scored


@dataclass(frozen=True, eq=False)
class Built:
    """An artifact whose tensors are all on the disk, each on its own.

    Args:
        options: the option of each tensor whose format is free, by the first names of its tensors.
        formats: the same option for each of these tensors, by its first name.
        assembly: the files of all tensors.
        outcome: how the search went.
    """

    options: Mapping[str, int]
    formats: Mapping[str, int]
    assembly: Assembly
    outcome: Outcome = field(default_factory=Outcome)


class FolderCompressor:
    """Makes artifacts of any damage or size from what was traced; see `Maker`.

    A tensor is rounded when an artifact has it in a format, and stays on the disk as long as this artifact or the next
    one is the last that was made: so there are two versions of a tensor at most.

    Args:
        weights: those of the whole model, of which some are loaded at a time.
        blocks: how it is divided.
        store: where everything is written.
        parts: the names of all parts, traced.
        target: the runtime that is fitted for, whose bytes count; None: pared itself.
        provenance: what the artifact says about where it comes from.
        executor: rounds.
        advance: is told the bytes of each tensor that was rounded.
    """

    def __init__(
        self,
        weights: Weights,
        blocks: ModelBlocks,
        store: Store,
        parts: Sequence[str],
        target: Target | None,
        provenance: Mapping[str, Any],
        executor: Executor,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._weights, self._blocks, self._store, self._provenance = weights, blocks, store, provenance
        self._executor, self._advance = executor, advance
        by_name = {tensor.name: tensor for tensor in weights.tensors}
        traced = [
            one
            for part in parts
            for one in read_traced(store.traced(part), by_name, target.offers if target is not None else ())
        ]
        self._free = _counting(traced)
        self._decided = {one.names[0]: one.decision for one in traced if one.decision is not None}
        self._target = target
        self._overhead = self._measured_overhead()
        self._last: frozenset[Path] = frozenset()  # the files of the artifact that was made last
        self._table = allocate.Table([free.options for free in self._free.values()])
        finest, coarsest = (allocate.choose(self._table, price) for price in allocate.ends(self._table))
        self.least = max(finest.damage * 2, 1e-12)
        self.most = max(coarsest.damage * (1 + 1e-9), self.least)

    def at_damage(self, damage: float) -> OperatingPoint:
        """See `Maker`; so are the other methods."""
        choice = allocate.within_damage(self._table, damage)
        return OperatingPoint(choice, damage, round(choice.nbytes + self._overhead))

    def within_bytes(self, nbytes: int, reserve: int = RESERVE) -> OperatingPoint:
        """The real bytes of each attempt correct the predicted ones; only what changes its format is rounded again."""
        best = closed_in(self._table, nbytes - reserve, self._overhead, self._nbytes)
        if best is None:
            least = allocate.choose(self._table, allocate.ends(self._table)[1])
            raise ConfigError(
                f"max_size is {nbytes:,} bytes, and the smallest file takes {self._nbytes(least) + reserve:,}",
                where="PostTrainingQuantConfig",
                remedy="Allow more bytes, or give fewer rules that keep tensors in float.",
            )
        return OperatingPoint(best, best.damage, self._nbytes(best))

    def contributors(self, point: OperatingPoint) -> list[tuple[str, float]]:
        """Tensors alone: their inputs are not rounded."""
        options = self._named(point.choice)
        damages = {name_of(free): float(free.options.damage[options[name]]) for name, free in self._free.items()}
        total = sum(damages.values()) or 1.0
        return sorted(((name, damage / total) for name, damage in damages.items()), key=lambda pair: -pair[1])

    @contextmanager
    def original(self) -> Iterator[nn.Module]:
        """The float model, of which one block at a time is in memory."""
        with _opened(ByBlock(self._weights, self._blocks)) as model:
            yield model

    def build(self, point: OperatingPoint) -> Built:
        """Round what is not there yet."""
        return self._built(self._named(point.choice))

    @contextmanager
    def candidate(self, made: Built) -> Iterator[nn.Module]:
        """A model whose weights stay in codes; on a runtime's grids, for which no kernel is here, one read by block."""
        if self._target is not None:
            instead = CodedNumbers(self._store, dict(made.formats))
            with _opened(ByBlock(self._weights, self._blocks, instead)) as model:
                yield model
            return
        place = self._store.candidate / secrets.token_hex(_DIGITS)  # workers keep open what had another name
        make_directory(place)
        path = made.assembly.write(place)
        try:
            opener = Loaded(path, path.stat().st_size, self._weights)
            model = opener.opened()
            with sendable(model, opener):
                yield model
        finally:
            self._store.forget([path])
            shutil.rmtree(self._store.candidate, ignore_errors=True)  # on NFS while a worker has it open: next time

    def told(self, made: Built, outcome: Outcome) -> Built:
        """The outcome is a part of the artifact; what was forgotten of it is rounded again."""
        return self._told(made.options, outcome)

    def nbytes_of(self, point: OperatingPoint, made: Built) -> int:
        """Known without putting it together."""
        return made.assembly.nbytes if self._target is None else point.nbytes

    def save(self, made: Built, directory: Path) -> Path:
        """Write which option each tensor has: the tensors are in the workspace already."""
        make_directory(directory)
        text = json.dumps({"options": dict(made.options), "outcome": made.outcome.to_json()}).encode()
        write_atomic(directory / _CHOICE, lambda file: file.write(text))
        return directory / _CHOICE

    def read(self, file: Path) -> Built:
        """Read that; tensors that are gone are rounded again."""
        held = read_object(file) or {}
        options = held.get("options")
        if not isinstance(options, dict) or options.keys() != self._free.keys():
            raise damaged(file, "it is about other tensors")
        return self._told(options, Outcome.from_json(held["outcome"]))

    def decisions(self, made: Built) -> dict[str, Decision]:
        """What each tensor became, by its first name."""
        found = dict(self._decided)
        for name, option in made.options.items():
            free = self._free[name]
            found |= {one.name: decision for one, decision in zip(free.tensors, free.decisions(option), strict=True)}
        return found

    def _measured_overhead(self) -> float:
        """About the bytes of a file beside those that the options count."""
        kept = [name for name, decision in self._decided.items() if decision.treatment != "made"]
        entries = [CodedFile(self._store.coded(name, FIXED)).entry() for name in kept]
        if self._target is None:
            return float(_ENTRY * len(self._weights.tensors) + sum(entry.nbytes for entry in entries))
        written = [*kept, *(tensor.name for free in self._free.values() for tensor in free.tensors)]
        return float(beside_nbytes(self._target, written) + sum(entry.source_nbytes for entry in entries))

    def _told(self, options: Mapping[str, int], outcome: Outcome) -> Built:
        found = self._built(options)
        provenance = {**self._provenance, "outcome": outcome.to_json()}
        return replace(found, assembly=replace(found.assembly, provenance=provenance), outcome=outcome)

    def _named(self, choice: Choice) -> dict[str, int]:
        return dict(zip(self._free, choice.options, strict=True))

    def _nbytes(self, choice: Choice) -> int:
        """The size of the file: of pared's own from rounding and coding every tensor."""
        if self._target is not None:
            return round(choice.nbytes + self._overhead)
        return self._built(self._named(choice)).assembly.nbytes

    def _built(self, options: Mapping[str, int]) -> Built:
        """Round what is not there yet; what neither this artifact nor the last one has is forgotten."""
        formats = {one.name: option for name, option in options.items() for one in self._free[name].tensors}
        files, made = [], []
        for tensor in self._weights.tensors:
            decision = self._decided.get(tensor.name)
            if decision is not None and decision.treatment == "made":
                made.append(tables.to_json(tables.made(tensor.names, tensor.tensor)))
            else:
                files.append(CodedFile(self._store.coded(tensor.name, formats.get(tensor.name, FIXED))))
        wanted = frozenset(file.path for file in files)
        self._store.keep_coded(wanted | self._last)  # before, so that there is space
        self._last = wanted
        self._round(options)
        return Built(options, formats, Assembly(files, self._provenance, tuple(made)))

    def _round(self, options: Mapping[str, int]) -> None:
        """Round what is not there yet in the format that was chosen."""
        missing = []
        for name, option in options.items():
            free = self._free[name]
            for tensor, decided in zip(free.tensors, free.decisions(option), strict=True):
                if not self._store.coded(tensor.name, option).is_file():
                    missing.append(Rounding(tensor.name, bare(free), option, decided))
        sizes = {one.name: one.tensor.nbytes for one in self._weights.tensors}
        for one in Rounder(self._weights, self._store).all(missing, self._executor):
            self._advance(sizes[one.name])


@contextmanager
def _opened(opener: ByBlock) -> Iterator[nn.Module]:
    """A model, which others open likewise."""
    with opener() as model, sendable(model, opener):
        yield model


def _counting(traced: Sequence[Traced]) -> dict[str, Free]:
    """What is free, by the name of its first tensor, with the damage that counts."""
    costs = {name: cost for one in traced if one.free for name, cost in zip(one.names, one.costs, strict=True)}
    factors = completing(costs)
    return {one.names[0]: counted(one.free, factors) for one in traced if one.free is not None}
