"""`pared expand`: decode an artifact into the source's types, as a `.safetensors` file, tensor by tensor."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from pared.artifact.decoding import decode
from pared.artifact.envelope import Records, find_artifact, open_records
from pared.artifact.index import STATE, Entry, Index
from pared.artifact.parse import parse_index
from pared.checkpoints.folders import companions
from pared.checkpoints.folders.companions import find_companions
from pared.errors import ConfigError, printable
from pared.files.directories.lock import owned
from pared.files.disk import as_path, forget, make_directory, write_atomic
from pared.files.safetensors_file import encoded_header
from pared.files.threads import each
from pared.formats.dtypes import TYPES, Array
from pared.terminal import bytes_done

WEIGHTS: Final = "model.safetensors"  # the name that transformers looks for
_BATCH: Final = 1 << 27


@dataclass(frozen=True)
class Expanded:
    """The result of an expansion.

    Args:
        path: the `.safetensors` file.
        source_nbytes: the size of the artifact.
        nbytes: the size of the file.
        seconds: the time it took.
        tied: the names of tied tensors, whose numbers are in the file a second time.
        tied_nbytes: the size of these repetitions.
        copied: the files that were copied beside it.
    """

    path: Path
    source_nbytes: int
    nbytes: int
    seconds: float
    tied: tuple[str, ...]
    tied_nbytes: int
    copied: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        if self.tied:
            more = f" and {len(self.tied) - 1:,} more" if self.tied[1:] else ""
            lines.append(
                f"tied: {self.tied[0]}{more} stored again, {self.tied_nbytes:,} bytes: the format cannot share them"
            )
        if self.copied:
            lines.append(f"copied: {', '.join(self.copied)}")
        speed = self.nbytes / 1e6 / max(self.seconds, 1e-3)
        figures = (
            f"{self.source_nbytes:,} -> {self.nbytes:,} bytes, {self.seconds:.1f} s, {speed:.0f} MB/s: {self.path}"
        )
        return "\n".join(map(printable, (*lines, figures)))


def expand(path: str | os.PathLike[str], output: str | os.PathLike[str], *, quiet: bool = True) -> Path:
    """Decode an artifact into floats of its source's types; what compression lost stays lost.

    Args:
        path: an artifact, or the directory that it is in; made by `compress` or by `save`.
        output: a `.safetensors` file; or a directory, in which `model.safetensors` is written and to which the other
            files of the artifact's directory are copied, so that a Hugging Face folder becomes one again.
        quiet: whether to hide the progress bar.

    Returns:
        the path of the file. A tied tensor is written under each of its names, because the format cannot share:
        `load_state_dict` finds all of them, and transformers ties them again.

    Raises:
        FileError: there is no artifact, or the output cannot be written, or another run writes to the directory.
        CorruptError, UnsafeError, VersionError: the artifact is damaged, or a newer version wrote it.
        ConfigError: a tensor has an element type that the format lacks, or a module has extra state of another kind.
    """
    return run(path, output, quiet=quiet).path


def run(path: str | os.PathLike[str], output: str | os.PathLike[str], *, quiet: bool = False) -> Expanded:
    """Do what `expand` does; return its result with sizes and times."""
    began = time.perf_counter()
    source, place = find_artifact(as_path(path, "expand")), as_path(output, "expand")
    folder = place.parent if place.suffix == ".safetensors" else place
    target = place if place.suffix == ".safetensors" else place / WEIGHTS
    if os.path.realpath(target) == os.path.realpath(source):  # which never raises
        raise ConfigError("is the artifact itself", where=str(target), remedy="Choose another place to write to.")
    with open_records(source) as records, ExitStack() as held:
        entries = _of_a_state_dict(parse_index(records), str(source))
        header = _header(entries, str(source))
        make_directory(folder)
        if folder is place:  # several files, which belong together
            held.enter_context(owned(folder))
        nbytes = sum(entry.source_nbytes * len(entry.names) for entry in entries)
        with bytes_done("expanding", nbytes, quiet=quiet) as advance:

            def write(file: BinaryIO) -> None:
                file.write(header)
                for entry, array in _decoded(entries, records):
                    for _ in entry.names:
                        file.write(array.reshape(-1).view(np.uint8).data)
                        advance(array.nbytes)

            write_atomic(target, write)
        names = find_companions(source.parent, folder).copied if folder is place else ()
        companions.copy(source.parent, names, folder, folder)
    return Expanded(
        target,
        records.nbytes,
        target.stat().st_size,
        time.perf_counter() - began,
        tied=tuple(name for entry in entries for name in entry.names[1:]),
        tied_nbytes=nbytes - sum(entry.source_nbytes for entry in entries),
        copied=names,
    )


def _of_a_state_dict(index: Index, where: str) -> tuple[Entry, ...]:
    """The tensors to write; extra state that is a single tensor is one of them, under its own name."""
    for name, tree in index.states.items():
        if tree != {"tensor": 0}:
            raise ConfigError(
                "is extra state of a module that is more than one tensor, which .safetensors files cannot hold",
                where=f"{where}: {name}",
                remedy="Load the artifact with pared.load, and save the state dict with torch.save.",
            )
    return tuple(
        replace(entry, names=(entry.name.removesuffix("/0"),)) if entry.kind == STATE else entry
        for entry in index.entries
    )


def _header(entries: Sequence[Entry], where: str) -> bytes:
    tensors: dict[str, Any] = {}
    end = 0
    for entry in entries:
        dtype, reserved = TYPES[entry.dtype].safetensors, "__metadata__" in entry.names
        if not dtype or reserved:
            raise ConfigError(
                "is a name that is reserved in .safetensors files"
                if reserved
                else f"is of type {entry.dtype}, which .safetensors files do not have",
                where=f"{where}: {'__metadata__' if reserved else entry.name}",
                remedy="Load the artifact with pared.load, and save the state dict with torch.save.",
            )
        for name in entry.names:
            span = [end, end + entry.source_nbytes]
            tensors[name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": span}
            end = span[1]
    return encoded_header("pt", tensors, alignment=8)


def _decoded(entries: Sequence[Entry], records: Records) -> Iterator[tuple[Entry, Array]]:
    """All tensors in the order of the file, decoded in batches by all cores."""
    batch: list[Entry] = []
    for i, entry in enumerate(entries):
        batch.append(entry)
        if i + 1 == len(entries) or sum(one.source_nbytes for one in batch) >= _BATCH:
            arrays = each(lambda one: _decode(one, records.data), batch, [one.elements for one in batch])
            yield from zip(batch, arrays, strict=True)
            batch = []


def _decode(entry: Entry, data: memoryview) -> Array:
    """Decode a tensor into a contiguous array, and release its pages of the artifact."""
    found = np.ascontiguousarray(decode(entry, data)).reshape(entry.shape)
    forget(data[next(iter(entry.parts.values())).offset : entry.end])
    return found
