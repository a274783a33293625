"""The phases of a fit of a folder: two sweeps, and then one artifact or a search for it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from pared.artifact.outcome import Curve
from pared.errors import FileError
from pared.fitting.calibration.blocks import blocks_of
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.search import trade_off
from pared.fitting.search.compressor import DEFAULT_DAMAGE, RESERVE_WITHOUT_SCORES
from pared.fitting.search.search import Judge, References, search
from pared.fitting.search.workspace import Workspace
from pared.fitting.streamed.deciding.compressor import Built, FolderCompressor
from pared.fitting.streamed.deciding.tracing import Tracing
from pared.fitting.streamed.parts.blocks import ModelBlocks
from pared.fitting.streamed.parts.weights import Weights
from pared.fitting.streamed.store import Store
from pared.fitting.streamed.sweeps import Sweeps
from pared.terminal import Stages, bytes_done

_OUTSIDE: Final = "outside"
_DIGITS: Final = 8  # of the name of a search's folder
_HALF: Final = 2  # bytes of a number of a factor, see `Factor.halved`
_MODELS: Final = 3  # the tensors of two, see `FolderCompressor`, and one that was put together of them
_SPARE: Final = 0.9  # share of the free space that may be used


@dataclass(frozen=True, eq=False)
class Run:
    """The phases, in order. Each does nothing where its results are there.

    Args:
        sweeps: the first phases.
        tracing: what they are for.
        provenance: what an artifact says about where it comes from.
        quiet: True shows no progress.
    """

    sweeps: Sweeps
    tracing: Tracing
    provenance: Mapping[str, Any]
    quiet: bool

    @property
    def blocks(self) -> ModelBlocks:
        """How the model is divided."""
        return self.sweeps.blocks

    @property
    def weights(self) -> Weights:
        """Those of the whole model."""
        return self.sweeps.weights

    @property
    def store(self) -> Store:
        """Where everything is written."""
        return self.sweeps.store

    @property
    def parts(self) -> list[str]:
        """The names of all parts, in the order in which they are traced."""
        return [*(_block(number) for number in reversed(range(len(self.blocks)))), _OUTSIDE]

    def names(self, part: str) -> tuple[str, ...]:
        """The first names of a part's tensors."""
        return self.blocks.outside if part == _OUTSIDE else self.blocks.tensors[int(part.rpartition("-")[2])]

    def compressor(self, advance: Callable[[int], None] = lambda _: None) -> FolderCompressor:
        """What makes artifacts, after both sweeps.

        Args:
            advance: is told the bytes of each tensor that is rounded.
        """
        if not self._all_traced():
            self._sweep()
        made_of = (self.weights, self.blocks, self.store, self.parts, self.tracing.target, self.provenance)
        return FolderCompressor(*made_of, self.sweeps.executor, advance)

    def built(self, judge: Judge | None, fingerprint: Mapping[str, str]) -> tuple[FolderCompressor, Built]:
        """Run all phases.

        Args:
            judge: scores models; None: nothing does.
            fingerprint: what the sweeps depend on.
        """
        conf = self.tracing.conf
        assert conf.max_size is None or isinstance(conf.max_size, int)  # the configuration has parsed it
        if judge is not None:
            compressor = self.compressor()
            with self.store.phase("searching", self._coded_nbytes()):
                return compressor, self._searched(compressor, judge, conf, fingerprint)
        if not self._all_traced():
            self._sweep()  # which has progress of its own
        with (
            self.store.phase("rounding weights", self._coded_nbytes()),
            self._progress("rounding weights") as advance,
        ):
            compressor = self.compressor(advance)
            if conf.max_size is not None:
                point = compressor.within_bytes(conf.max_size, RESERVE_WITHOUT_SCORES)
            else:
                point = compressor.at_damage(max(DEFAULT_DAMAGE, compressor.least))
            return compressor, compressor.build(point)

    def curve(self, judge: Judge | None, points: int) -> Curve:
        """Run all phases up to the curve.

        Args:
            judge: scores its models; None: nothing is built.
            points: how many points it has at most.
        """
        compressor = self.compressor()
        with self.store.phase("tracing", self._coded_nbytes()), Stages(quiet=self.quiet).stage("tracing"):
            return trade_off.trace(compressor, judge, points=points)

    def _searched(
        self,
        compressor: FolderCompressor,
        judge: Judge,
        conf: PostTrainingQuantConfig,
        fingerprint: Mapping[str, str],
    ) -> Built:
        """The smallest artifact that is good enough; the records of each search are in a folder of their own."""
        wanted = {"criterion": repr(judge.criterion), "max_size": str(conf.max_size)}
        whole = {**fingerprint, **wanted, "confirm_func": "given" if judge.confirm_func is not None else "none"}
        name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:_DIGITS]
        records = Workspace(self.store.directory / f"search-{name}", whole)
        start = compressor.most if conf.quant_level == 0 else DEFAULT_DAMAGE
        stages = Stages(quiet=self.quiet)
        with stages.stage("scoring the float model"):
            references = References.of(compressor, judge, records)
        with stages.stage("searching"):
            max_size = conf.max_size if isinstance(conf.max_size, int) else None
            return search(compressor, judge, max_size=max_size, references=references, workspace=records, start=start)

    def _all_traced(self) -> bool:
        return all(self.store.traced(part).is_file() for part in self.parts)

    def _sweep(self) -> None:
        last = len(self.blocks)
        self.sweeps.start()
        self.sweeps.every = self._every()
        needed = self._needed(self.sweeps.every)
        if not self.store.traced(_block(last - 1)).is_file():
            with self.store.phase("running what comes before the blocks", needed):
                self.sweeps.enter()
            with self.store.phase("running blocks", needed), self._progress("running blocks") as advance:
                for number in range(last):
                    self.sweeps.forward(number)
                    advance(self._nbytes(_block(number)))
            with self.store.phase("running the head", needed):
                self.sweeps.top()
        with self.store.phase("measuring errors", needed), self._progress("measuring what errors cost") as advance:
            for number in reversed(range(last)):
                part = _block(number)
                if not self.store.traced(part).is_file():
                    self.tracing.trace(part, self.names(part), self.sweeps.backward(number), self.sweeps.executor)
                self.sweeps.forget_gradient(number + 1)
                if number + 1 < last:
                    self.sweeps.forget_state(number + 1)
                advance(self._nbytes(part))
            if not self.store.traced(_OUTSIDE).is_file():
                self.tracing.trace(_OUTSIDE, self.blocks.outside, self.sweeps.outside(), self.sweeps.executor)
            self.sweeps.forget_gradient(0)
            for number in (0, last):
                self.sweeps.forget_state(number)

    def _every(self) -> int:
        """How many blocks there are for each of which what enters it is kept: as few as the disk has space for.

        Raises:
            FileError: there is not even space for the least.
        """
        noted = self.store.noted("every")
        if noted is not None:
            return int(noted["every"])
        free = int(shutil.disk_usage(self.store.directory).free * _SPARE)
        every = next((k for k in range(1, len(self.blocks) + 1) if self._needed(k) <= free), None)
        if every is None:
            raise FileError(
                f"about {self._needed(len(self.blocks)):,} bytes are needed, and {free:,} may be used",
                where=str(self.store.directory),
                remedy="Free space, put the workspace on another disk, or pass fewer samples.",
            )
        self.store.note("every", {"every": every})
        return every

    def _needed(self, every: int) -> int:
        """About how many bytes all phases write."""
        count = len(self.blocks)
        kept = -(-count // every) + (min(every, count) if every > 1 else 0) + 2
        factors = 0
        for tensor in self.weights.tensors:
            if tensor.weight_like:
                layout = blocks_of(tensor)
                width = -(-tensor.view.n_columns // layout.column_blocks)
                factors += _HALF * layout.groups * layout.column_blocks * width**2
        return kept * self.sweeps.states_nbytes + 2 * self.sweeps.gradients_nbytes + factors + self._coded_nbytes()

    def _coded_nbytes(self) -> int:
        """About the bytes of the models that are there at a time: a byte for a weight, unless a size was asked for."""
        most = self.tracing.conf.max_size
        return _MODELS * (most if isinstance(most, int) else self.weights.count)

    def _nbytes(self, part: str) -> int:
        return sum(tensor.tensor.nbytes for tensor in self.weights.some(self.names(part)))

    @contextmanager
    def _progress(self, description: str) -> Iterator[Callable[[int], None]]:
        with bytes_done(description, sum(map(self._nbytes, self.parts)), quiet=self.quiet) as advance:
            yield advance


def _block(number: int) -> str:
    return f"block-{number:04d}"
