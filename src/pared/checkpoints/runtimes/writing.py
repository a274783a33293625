"""A checkpoint for a runtime: formats are chosen, then each tensor is read, rounded and written, one at a time."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from pared.checkpoints.result import Compressed
from pared.checkpoints.runtimes.choosing import Format, formats_within, nbytes_of, rounded, sample_of, units_of
from pared.checkpoints.runtimes.conversion import CONFIG, config_of
from pared.checkpoints.runtimes.roles import Weight, weights_of
from pared.checkpoints.sampling import array_of, release
from pared.checkpoints.selection import Contained, LeftOut
from pared.errors import ConfigError
from pared.files.directories.whole import whole
from pared.files.threads import usable_cores
from pared.formats.dtypes import FLOATING, Array, as_floats
from pared.formats.grids import magnitudes, refuse_damaged
from pared.formats.groups.grid import Numbers
from pared.readers.listing import Listing
from pared.scalars import check_choice, plain
from pared.targets.folders.folder import dtype_of
from pared.targets.pieces import Outline, Source
from pared.targets.table import OWN, TARGETS
from pared.targets.target import Target
from pared.targets.writers import check_described, size_of, writer_of
from pared.terminal import bytes_done, parse_size
from pared.version import __version__

log = logging.getLogger(__name__)

_NO_CONFIG: Final = "Pass the folder of the model, as Hugging Face has it."
_ROUNDS: Final = 8  # until a file is small enough; the second knows what a file takes beside the weights
_SHOWN: Final = 5  # names in a line


@dataclass(frozen=True)
class Goal:
    """What the user asks for.

    Args:
        target: the runtime.
        bits: the average over all weights in its file; None: as the size has it.
        max_size: the largest size of the files with weights, in bytes.
    """

    target: Target
    bits: float | None
    max_size: int | None


def goal_of(target: str, bits: object, max_size: int | str | None) -> Goal:
    """The user's options, checked.

    Raises:
        ConfigError: there is no such target, or it needs the model's code, or a package; or not one size was given.
    """
    check_choice("compress", "target", target, (OWN, *TARGETS))
    found = TARGETS[target]
    if found.takes == "graph":
        raise ConfigError(
            f"{target} needs the graph of the model, which a checkpoint does not have",
            where="target",
            remedy="Load the model, and pass it to pared.fit.",
        )
    writer_of(target)
    rate = plain(bits)
    if (rate is None) == (max_size is None):
        raise ConfigError(
            "give either bits or max_size",
            where=f"compress for {target}",
            remedy="bits=4.5 is an average over all weights, embeddings too; max_size is in bytes.",
        )
    if max_size is not None:
        return Goal(found, None, parse_size(max_size))
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 32:
        raise ConfigError(f"bits={bits!r} is not a valid rate", where="compress", remedy="Use one above 0, up to 32.")
    return Goal(found, float(rate), None)


def write_for(source: Path, output: Path, chosen: Contained, goal: Goal, *, quiet: bool) -> Compressed:
    """Write the weights of a checkpoint for a runtime.

    Args:
        source: the folder with its configuration and tokenizer.
        output: where to; a folder, or the file of a runtime that reads one file.
        chosen: its tensors.
        goal: what is asked for.
        quiet: whether to hide the progress bar.

    Raises:
        ConfigError: the runtime cannot take the model, or not in that size.
        FileError: nothing can be written there.
        ModelError: a weight is NaN or infinite.
    """
    began = time.perf_counter()
    config = config_of(source, _NO_CONFIG)
    check_described(goal.target, config, source)
    goal = replace(goal, target=goal.target.for_model(dtype_of(config)))
    weights = weights_of(chosen.kept, config, goal.target)
    listing = chosen.listing
    _tell_stacks(weights, goal.target)
    work = _Work(source, listing, weights, config, goal, quiet)
    with whole(output) as made:
        files = work.written(made)
        nbytes = sum(file.stat().st_size for file in files)
        beside = sorted(path.name for path in made.iterdir() if path not in files) if made.is_dir() else []
    unread = {weight.kept.name for weight in weights}
    unused = tuple(
        LeftOut(one.name, one.held.nbytes, f"{goal.target.name} does not read it", "ballast")
        for one in chosen.kept
        if one.name not in unread
    )
    return Compressed(
        output,
        source_nbytes=listing.nbytes - sum(note.nbytes for note in listing.notes.values() if note.file),
        weight_nbytes=sum(weight.kept.held.nbytes for weight in weights),
        nbytes=nbytes,
        seconds=time.perf_counter() - began,
        left_out=(*chosen.left_out, *unused),
        copied=tuple(name for name in beside if (source / name).is_file() and name != CONFIG),
        resumed=0,
        about=work.about(),
        plain=listing.plain,
    )


def _tell_stacks(weights: Sequence[Weight], target: Target) -> None:
    """Name, before any work, stacks of matrices: nobody expects experts to stay as they are."""
    stacks = [one for one in weights if one.is_stack]
    if stacks:
        log.warning(
            "%s has no format for stacks of matrices: %s and %d more stay as they are, %s of %s bytes. Experts are "
            "rounded where a checkpoint names each matrix",
            *(target.name, stacks[0].name, len(stacks) - 1),
            *(f"{sum(one.kept.held.nbytes for one in some):,}" for some in (stacks, weights)),
        )


class _Work:
    """Chooses formats for the weights of a checkpoint, and rounds them as they are written."""

    def __init__(
        self,
        source: Path,
        listing: Listing,
        weights: Sequence[Weight],
        config: Mapping[str, Any],
        goal: Goal,
        quiet: bool,
    ) -> None:
        self._folder = source
        self._listing = listing
        self._weights = weights
        self._config = config
        self._goal = goal
        self._quiet = quiet
        self._by_name = {weight.name: weight for weight in weights}
        self._count = sum(math.prod(weight.kept.held.shape) for weight in weights)
        self._formats: Sequence[Format] = ()

    def written(self, path: Path) -> list[Path]:
        """Write what fits the goal with least damage; the files with weights."""
        target = self._goal.target.name
        units = units_of(self._weights, self._goal.target, self._sample)
        budget = self._count * self._goal.bits / 8 if self._goal.bits is not None else float(self._goal.max_size or 0)
        planned = size_of(target)
        most = self._goal.max_size or math.inf
        for _ in range(_ROUNDS):
            asked = "max_size" if self._goal.bits is None else "bits"
            self._formats = formats_within(units, budget, self._count, self._goal.target, asked)
            more = planned(self._source()) - most if planned is not None else 0
            if more <= 0:
                files = self._write(path)
                more = sum(file.stat().st_size for file in files) - most
                if more <= 0:
                    return files
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            budget -= more
        raise ConfigError(
            f"{target}: after {_ROUNDS} attempts its files are still {more:,.0f} bytes larger than max_size",
            where="compress",
            remedy="Allow as many bytes more.",
        )

    def _write(self, path: Path) -> list[Path]:
        total = sum(weight.kept.held.nbytes for weight in self._weights)
        with bytes_done(f"writing for {self._goal.target.name}", total, quiet=self._quiet) as advance:
            return writer_of(self._goal.target.name)(self._source(advance), path)

    def _source(self, advance: Callable[[int], None] = lambda _: None) -> Source:
        outlines = [
            Outline(weight.name, one.held.shape, weight.role, kind, one.held.dtype, weight.names)
            for weight, kind in zip(self._weights, self._formats, strict=True)
            for one in [weight.kept]
        ]

        def read(outline: Outline) -> Mapping[str, Numbers]:
            weight = self._by_name[outline.name]
            parts = self._parts(weight, outline.offer)
            advance(weight.kept.held.nbytes)
            return parts

        asked = {"bits": self._goal.bits} if self._goal.max_size is None else {"max_size": self._goal.max_size}
        provenance = {"pared": __version__, "compress": asked}
        return Source(outlines, read, self._config, self._folder, provenance)

    def _matrix(self, weight: Weight) -> Array:
        array = array_of(self._listing, weight.kept)
        return array.T if weight.transposed else array

    def _sample(self, weight: Weight) -> Array:
        matrix = self._matrix(weight)
        rows = np.ascontiguousarray(sample_of(matrix))
        if not np.isfinite(as_floats(rows)).all():
            refuse_damaged(as_floats(matrix), weight.name)
        release(self._listing, weight.kept)
        return rows

    def _parts(self, weight: Weight, kind: Format) -> Mapping[str, Numbers]:
        if kind is None:
            values = array_of(self._listing, weight.kept)
            if weight.kept.held.dtype in FLOATING:
                _check_finite(values, weight.name)
            parts: Mapping[str, Numbers] = {"values": values}
        else:
            matrix = self._matrix(weight)
            if not np.isfinite(magnitudes(matrix, usable_cores())).all():
                refuse_damaged(as_floats(matrix), weight.name)
            parts = rounded(matrix, kind, usable_cores())
            if "values" in parts and not np.isfinite(as_floats(parts["values"])).all():
                raise ConfigError(
                    f"holds numbers up to {magnitudes(matrix).max():.3g}, which {kind.name} cannot hold",
                    where=weight.name,
                    remedy="Ask for fewer bits, at which it is rounded, or for 32.",
                )
            if "values" in parts and weight.transposed:  # values have the tensor's shape, only codes that of the matrix
                parts = {"values": parts["values"].T}
        release(self._listing, weight.kept)
        return parts

    def about(self) -> str:
        """Which formats there are, and what stays in float."""
        pairs = list(zip(self._weights, self._formats, strict=True))
        counts = Counter(kind.name for _, kind in pairs if kind is not None)
        kept = [weight.name for weight, kind in pairs if kind is None and (weight.role != "other" or weight.is_stack)]
        formats = ", ".join(f"{count} of {name}" for name, count in counts.most_common())
        bits = 8 * sum(nbytes_of(weight, kind) for weight, kind in pairs) / self._count
        more = f" and {len(kept) - _SHOWN} more" if len(kept) > _SHOWN else ""
        floats = f"; in float stay {', '.join(kept[:_SHOWN])}{more}" if kept else ""
        return f"{bits:.3f} bits per weight on average: {formats or 'nothing is rounded'}{floats}"


def _check_finite(values: Array, name: str) -> None:
    """Refuse a damaged tensor among those that stay in float, row by row; a mask of infinities is none."""
    rows = values.reshape(len(values), -1) if values.ndim > 1 else values.reshape(1, -1)
    damaged = rows[~np.isfinite(magnitudes(rows, usable_cores()))] if rows.size else rows
    found = as_floats(damaged)
    if np.isnan(found).any() or len(np.unique(found[np.isfinite(found)])) > 1:
        refuse_damaged(as_floats(values), name)
