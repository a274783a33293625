"""An artifact in several files, for places that limit the size of one: each is an artifact of some of the tensors.

Beside them stands an index as transformers has it, `best_model.safetensors.index.json`, which says where each tensor
is. What a shard adds to a whole artifact is in its provenance: its number, and the checksum of the artifact it is of.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from pared.artifact.envelope import FILE_NAMES, INDEX_FILE, Records, open_records
from pared.artifact.index import Entry, Index
from pared.artifact.parse import parse_index
from pared.artifact.parts import parts_of, placed
from pared.errors import CorruptError, FileError
from pared.files.disk import reading, write_atomic
from pared.files.safetensors_file import write_safetensors

_KEY: Final = "shard"  # of the provenance
_NAME: Final = re.compile(r"best_model-\d{5}-of-\d{5}\.safetensors")
_OVERHEAD: Final = 1 << 12  # bytes of a file beside its tensors, and for each entry of its index (estimates)
_ENTRY: Final = 256


def split(artifact: Path, most: int) -> Path:
    """Divide an artifact into shards where it is larger than wanted; what was there of earlier shards is deleted.

    Tensors of one module stay together, so that a shard may be larger if a module is.

    Args:
        artifact: `best_model.safetensors`. It is deleted at the end, if it is divided.
        most: the size of a shard in bytes.

    Returns:
        the artifact, or the index of the shards.

    Raises:
        CorruptError: its numbers do not match their checksums.
        FileError: the folder cannot be written.
    """
    old = _names_beside(artifact)
    found = artifact
    if artifact.stat().st_size > most:
        with open_records(artifact) as records:
            found = _divided(records, parse_index(records), artifact.parent, most)
        artifact.unlink()
    new = set(_names_beside(artifact)) if found != artifact else set()
    for name in old:
        if name not in new:
            artifact.with_name(name).unlink(missing_ok=True)
    if found == artifact:
        artifact.with_name(INDEX_FILE).unlink(missing_ok=True)
    return found


def _names_beside(artifact: Path) -> list[str]:
    """The shards that an index beside an artifact names, if they have names of ours."""
    index = artifact.with_name(INDEX_FILE)
    return [path.name for path in shards_of(index)] if index.is_file() else []


def _divided(records: Records, index: Index, folder: Path, most: int) -> Path:
    groups = list(_groups(index.entries, most))
    of = zlib.crc32(records.index)
    where: dict[str, str] = {}
    for number, entries in enumerate(groups):
        name = f"best_model-{number + 1:05}-of-{len(groups):05}.safetensors"
        part, data = _part(records, index, entries, first=number == 0)
        part = replace(
            part, provenance={**index.provenance, _KEY: {"number": number + 1, "of": len(groups), "crc32": of}}
        )
        write = partial(write_safetensors, index=part.to_bytes(), data=(data,), nbytes=len(data))
        write_atomic(folder / name, write)
        where |= {entry.name: name for entry in entries}  # once, as transformers has tied tensors
    text = json.dumps({"metadata": {"total_size": len(records.data)}, "weight_map": where}, indent=1, sort_keys=True)
    write_atomic(folder / INDEX_FILE, lambda file: file.write(text.encode()))
    return folder / INDEX_FILE


def _groups(entries: Sequence[Entry], most: int) -> Iterator[list[Entry]]:
    """Neighbouring tensors, none of which has a sister in another group."""
    modules: list[list[Entry]] = []
    for entry in entries:
        if modules and _module(modules[-1][0].name) == _module(entry.name):
            modules[-1].append(entry)
        else:
            modules.append([entry])
    group: list[Entry] = []
    size = _OVERHEAD
    for module in modules:
        nbytes = sum(entry.nbytes + _ENTRY for entry in module)
        if group and size + nbytes > most:
            yield group
            group, size = [], _OVERHEAD
        group = [*group, *module]
        size += nbytes
    yield group


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _part(records: Records, index: Index, entries: Sequence[Entry], *, first: bool) -> tuple[Index, bytes]:
    """The index and the data of some tensors; the first part has what belongs to none."""
    data = bytearray()
    moved = []
    for entry in entries:
        pieces = parts_of(entry, records.data)
        parts = placed(pieces, len(data))
        for part, piece in zip(parts.values(), pieces.values(), strict=True):
            data.extend(bytes(part.offset - len(data)))
            data.extend(piece.payload)
        moved.append(replace(entry, parts=parts))
    here = {_module(name) for entry in entries for name in entry.names}
    held = {_module(name) for entry in index.entries for name in entry.names}
    modules = {name: one for name, one in index.modules.items() if name in here or (first and name not in held)}
    states = {entry.name.rpartition("/")[0] for entry in entries if entry.kind == "state"}
    every = {entry.name.rpartition("/")[0] for entry in index.entries if entry.kind == "state"}
    trees = {name: tree for name, tree in index.states.items() if name in states or (first and name not in every)}
    return Index(tuple(moved), modules, index.provenance, trees, index.made if first else ()), bytes(data)


def sharded_in(path: Path) -> Path | None:
    """The index of shards in a directory that has no whole artifact, or the index itself; None where there is none.

    Raises:
        FileError: the directory cannot be read.
    """
    if path.name == INDEX_FILE:
        return path
    with reading(path):
        whole = any((path / name).is_file() for name in FILE_NAMES.values())
        return path / INDEX_FILE if not whole and (path / INDEX_FILE).is_file() else None


def shards_of(index: Path) -> tuple[Path, ...]:
    """The files that an index names, in their order.

    Raises:
        CorruptError: it is not an index of ours.
        FileError: it cannot be read, or a shard is missing.
    """
    with reading(index):
        try:
            found: Any = json.loads(index.read_text(encoding="utf-8"))
            names = sorted(set(found["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptError("is not an index of shards", where=str(index)) from error
    if not names or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise CorruptError("names files that are not shards of an artifact", where=str(index))
    return tuple(index.with_name(name) for name in names)


def check_shards(index: Path, provenances: Sequence[Mapping[str, Any]]) -> None:
    """Refuse shards that are not all of one artifact, by the provenance of each, in their order.

    Raises:
        CorruptError: one is of another artifact, or one is missing.
    """
    notes = [provenance.get(_KEY) for provenance in provenances]
    first = notes[0] if isinstance(notes[0], dict) else {}
    expected = [{**first, "number": number, "of": len(notes)} for number in range(1, len(notes) + 1)]
    for path, note, wanted in zip(shards_of(index), notes, expected, strict=True):
        if note != wanted:
            raise CorruptError("is not a shard of the same artifact as those before it", where=str(path))


def whole(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of the artifact that a shard is of.

    >>> whole({"seed": 0, "shard": {"number": 1}})
    {'seed': 0}
    """
    return {key: value for key, value in provenance.items() if key != _KEY}


def check_there(index: Path) -> tuple[Path, ...]:
    """The shards, all of which are there.

    Raises:
        CorruptError: the index is not one of ours.
        FileError: one is missing.
    """
    paths = shards_of(index)
    for path in paths:
        if not path.is_file():
            what = f"{path.name} is missing, which {index.name} names"
            raise FileError(what, where=str(index.parent), remedy="Fetch the folder again; all shards are needed.")
    return paths
