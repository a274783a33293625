"""`pared expand`: decode an artifact into the source's types, as a `.safetensors` file, tensor by tensor."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from pared.artifact.beside import companions
from pared.artifact.beside.companions import find_companions
from pared.artifact.decoding.pieces import need, pieces
from pared.artifact.decoding.whole import decode
from pared.artifact.envelope import Records, artifact_in, find_artifact, open_records
from pared.artifact.index import STATE, Entry, Index
from pared.artifact.listing import artifact_parts
from pared.artifact.parse import parse_index
from pared.checkpoints.folders.layout import layout_of, refuse_foreign, single, written_metadata
from pared.errors import ConfigError, printable
from pared.files.directories.lock import owned
from pared.files.disk import as_path, forget, make_directory, write_atomic
from pared.files.memory_limit import MemoryLimit
from pared.files.remote.urls import output_at, source_at, written_at
from pared.files.safetensors_file import encoded_header
from pared.files.threads import each
from pared.formats.dtypes import TYPES, Array
from pared.terminal import bytes_done

_SUFFIX: Final = ".safetensors"
_BATCH: Final = 3 << 27  # bytes of memory that decoding a batch of tensors takes


@dataclass(frozen=True)
class Expanded:
    """The result of an expansion.

    Args:
        path: the `.safetensors` file; the index of several, the folder of several models.
        source_nbytes: the size of the artifact.
        nbytes: the size of the file, or of all files.
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
        path: an artifact, or the directory that it is in; made by `compress` or by `save`. Or the URL of either.
        output: a `.safetensors` file; or a directory, in which files of the source's names are written (its shards
            with their index; `model.safetensors` where the source was a single file) and to which the other files of
            the artifact's directory are copied, so that a Hugging Face folder becomes one again. Or a URL where
            nothing is.
        quiet: whether to hide the progress bar.

    Returns:
        the path of the file; of several shards their index, of several models `output`. A tied tensor is written under
        each of its names, because the format cannot share: `load_state_dict` finds all of them, and transformers ties
        them again.

    Raises:
        FileError: there is no artifact, or the output cannot be written, or another run writes to the directory, or
            there is a file that `expand` did not write where a file is to be written.
        CorruptError, UnsafeError, VersionError: the artifact is damaged, or a newer version wrote it.
        ConfigError: a tensor has an element type that the format lacks, or a module has extra state of another kind.
    """
    with output_at(output, "expand") as place:
        done = run(path, place, quiet=quiet)
    return written_at(output, done.path)


def run(path: str | os.PathLike[str], output: str | os.PathLike[str], *, quiet: bool = False) -> Expanded:
    """Do what `expand` does; return its result with sizes and times."""
    source, place = source_at(path, "expand"), as_path(output, "expand")
    parts = artifact_parts(source)
    if parts:
        return _each(source, place, parts, quiet=quiet)
    return _run(find_artifact(source), place, quiet=quiet)


def _each(source: Path, place: Path, parts: Sequence[str], *, quiet: bool) -> Expanded:
    """Expand the artifacts of a folder of several models, each into its own folder."""
    if place.suffix == _SUFFIX:
        raise ConfigError(
            f"holds {len(parts)} models, which are not written into one file",
            where=str(source),
            remedy="Pass a directory, or the artifact of one of them.",
        )
    done = [_run(artifact_in(source / part), place / part, quiet=quiet, part=True) for part in parts]
    with owned(place):
        names = find_companions(source, place).copied
        companions.copy(source, names, place, place)
    return Expanded(
        place,
        sum(one.source_nbytes for one in done),
        sum(one.nbytes for one in done),
        sum(one.seconds for one in done),
        tied=tuple(f"{part}/{name}" for part, one in zip(parts, done, strict=True) for name in one.tied),
        tied_nbytes=sum(one.tied_nbytes for one in done),
        copied=names,
    )


def _run(source: Path, place: Path, *, quiet: bool, part: bool = False) -> Expanded:
    """Expand one artifact.

    Args:
        source: the artifact.
        place: a file, or a directory.
        quiet: whether to hide the progress bar.
        part: whether it is one of several models of a folder, whose other files are copied with that folder.
    """
    began = time.perf_counter()
    whole = place.suffix != _SUFFIX  # a folder, as the source was
    folder = place if whole else place.parent
    with open_records(source) as records, ExitStack() as held:
        index = parse_index(records)
        entries = _of_a_state_dict(index, str(source))
        layout = layout_of(index.provenance, len(entries), str(source)) if whole else single(len(entries), place.name)
        for name in layout.files:
            if os.path.realpath(folder / name) == os.path.realpath(source):  # which never raises
                what, remedy = "is the artifact itself", "Choose another place to write to."
                raise ConfigError(what, where=str(folder / name), remedy=remedy)
            refuse_foreign(folder / name)
        metadata = written_metadata(index.provenance)
        headers = {name: _header(group, metadata, str(source)) for name, group in layout.divided(entries)}
        make_directory(folder)
        if whole:  # several files, which belong together
            held.enter_context(owned(folder))
        nbytes = sum(entry.source_nbytes * len(entry.names) for entry in entries)
        with bytes_done("expanding", nbytes, quiet=quiet) as advance:
            for name, group in layout.divided(entries):
                write_atomic(folder / name, partial(_write, headers[name], group, records, advance))
        if layout.index:
            content = layout.index_bytes(entries)
            write_atomic(folder / layout.index, lambda file: file.write(content))
        names = find_companions(source.parent, folder).copied if whole and not part else ()
        companions.copy(source.parent, names, folder, folder)
    return Expanded(
        folder / layout.main,
        records.nbytes,
        sum((folder / name).stat().st_size for name in layout.files),
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


def _write(
    header: bytes, entries: Sequence[Entry], records: Records, advance: Callable[[int], object], file: BinaryIO
) -> None:
    file.write(header)
    for entry, content in _decoded(entries, records):
        for _ in entry.names:
            for array in content():
                file.write(array.reshape(-1).view(np.uint8).data)
                advance(array.nbytes)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str], where: str) -> bytes:
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
    return encoded_header(metadata, tensors, alignment=8)


def _decoded(entries: Sequence[Entry], records: Records) -> Iterator[tuple[Entry, Callable[[], Iterable[Array]]]]:
    """All tensors in the order of the file: in batches by all cores, and what exceeds a batch piece by piece."""
    limit = MemoryLimit(records.where, records.nbytes)
    most = min(_BATCH, limit.left // 2)
    batch: list[Entry] = []
    taken = 0
    for i, entry in enumerate(entries):
        large = need(entry) > most
        if not large:
            batch.append(entry)
            taken += need(entry)
        following = entries[i + 1] if i + 1 < len(entries) else None
        if large or following is None or taken + need(following) > most:
            arrays = each(lambda one: _decode(one, records.data), batch, [one.elements for one in batch])
            yield from ((one, partial(iter, [array])) for one, array in zip(batch, arrays, strict=True))
            batch, taken = [], 0
        if large:
            yield entry, partial(pieces, entry, records.data, limit)


def _decode(entry: Entry, data: memoryview) -> Array:
    """Decode a tensor into a contiguous array, and release its pages of the artifact."""
    found = np.ascontiguousarray(decode(entry, data)).reshape(entry.shape)
    forget(data[next(iter(entry.parts.values())).offset : entry.end])
    return found
