"""`pared export`: an artifact for another runtime, tensor by tensor, without torch and without the model's code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from pared.artifact.decoding.whole import decode, numbers_of, view_of
from pared.artifact.envelope import find_artifact, open_records
from pared.artifact.index import STATE, Entry
from pared.artifact.parse import parse_index
from pared.checkpoints.runtimes.roles import family_if_known, role_of
from pared.checkpoints.selection import Kept
from pared.errors import ConfigError, CorruptError
from pared.files.disk import as_path, reading
from pared.formats.groups.grid import GroupGrid, Numbers
from pared.formats.views import matrix_of
from pared.readers.listing import ListedTensor
from pared.targets.conversion import Held, converted
from pared.targets.families.table import family_of
from pared.targets.table import TARGETS, check_other
from pared.targets.writers import writer_of

CONFIG: Final = "config.json"
_NO_CONFIG: Final = "Pass --folder, the Hugging Face folder that the model came from."


@dataclass(frozen=True)
class Converted:
    """The result.

    Args:
        files: those with weights.
        source_nbytes: the size of the artifact.
        nbytes: the size of these files.
        formats: the number of tensors in each of the runtime's formats.
    """

    files: tuple[Path, ...]
    source_nbytes: int
    nbytes: int
    formats: Mapping[str, int]

    def __str__(self) -> str:
        formats = ", ".join(f"{count} in {name}" for name, count in self.formats.items())
        return f"{self.source_nbytes:,} -> {self.nbytes:,} bytes, {formats}: {self.files[0]}"


def convert(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: str,
    folder: str | os.PathLike[str] | None = None,
) -> Converted:
    """Write an artifact for a runtime, where that is exact.

    Args:
        path: an artifact, or the directory that it is in.
        output: where to; as the runtime has it, a file or a folder.
        to: the runtime, one that takes weights by name.
        folder: the Hugging Face folder with config.json and the tokenizer; default: the artifact's directory.

    Raises:
        ConfigError: the target needs the model's code, there is no configuration, or the runtime cannot hold a tensor.
        FileError: a file cannot be read or written.
        CorruptError, UnsafeError, VersionError: the artifact is damaged, or a newer version wrote it.
    """
    check_other("pared export", to, "Use the artifact as it is")
    target = TARGETS[to]
    if target.takes == "graph":
        raise ConfigError(
            f"{to} needs the graph of the model, which an artifact does not have",
            where="pared export",
            remedy=f"Load it with pared.load(artifact, model), and call pared.export(model, path, inputs, to={to!r}).",
        )
    write = writer_of(to)
    file, place = find_artifact(as_path(path, "export")), as_path(output, "export")
    beside = file.parent if folder is None else as_path(folder, "export")
    config = config_of(beside, _NO_CONFIG)
    with open_records(file) as records:
        index = parse_index(records)
        family = family_of(config) if target.by_family else family_if_known(config)
        held = [
            _held(entry, records.data)
            for entry in index.entries
            if entry.kind != STATE and (family is None or family.uses(entry.name))
        ]
        source = converted(held, target, config, beside, index.provenance)
        files = tuple(write(source, place))
        nbytes = records.nbytes
    formats: dict[str, int] = {}
    for outline in source.outlines:
        name = outline.dtype if outline.offer is None else outline.offer.name
        formats[name] = formats.get(name, 0) + 1
    return Converted(files, nbytes, sum(one.stat().st_size for one in files), formats)


def config_of(folder: Path, remedy: str) -> Mapping[str, Any]:
    """The content of a folder's config.json.

    Args:
        folder: a folder of Hugging Face.
        remedy: what to do where it has none.

    Raises:
        ConfigError: it has none.
        CorruptError: it is not a JSON object.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ConfigError(
            f"has no {CONFIG}, which says what the model is",
            where=str(folder),
            remedy=remedy,
        )
    with reading(file):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorruptError(f"is not JSON: {error}", where=str(file), remedy="Fetch the file again.") from error
    if not isinstance(found, dict):
        raise CorruptError("is not a JSON object", where=str(file), remedy="Fetch the file again.")
    return found


def _held(entry: Entry, data: memoryview) -> Held:
    kind: Literal["parameter", "buffer"] = "parameter" if entry.kind == "parameter" else "buffer"
    listed = ListedTensor(entry.name, entry.dtype, entry.shape, entry.source_nbytes, None)
    role = role_of(Kept(listed, entry.names, kind))
    # Models tie their heads to their tables, which are what runtimes know.
    names = tuple(sorted(entry.names, key=lambda name: "embed" not in name)) if role == "table" else entry.names
    on_grid = entry.format["tag"] == "grid" or entry.groups is not None
    if role == "other" or not on_grid:
        dtype = entry.dtype if on_grid else str(entry.format.get("dtype", entry.dtype))
        return Held(names, entry.shape, dtype, frozenset([role]), None, (1, 1), partial(_values, entry, data))
    view = view_of(entry)
    grid: GroupGrid | Literal["rows"] = entry.groups or "rows"
    matrix = (view.n_rows, view.n_columns)
    return Held(names, entry.shape, entry.dtype, frozenset([role]), grid, matrix, partial(_parts, entry, data))


def _values(entry: Entry, data: memoryview) -> Mapping[str, Numbers]:
    parts = numbers_of(entry, data)
    return parts if "values" in parts else {"values": decode(entry, data)}


def _parts(entry: Entry, data: memoryview) -> Mapping[str, Numbers]:
    parts = numbers_of(entry, data)
    return {**parts, "codes": matrix_of(parts["codes"], view_of(entry))}
