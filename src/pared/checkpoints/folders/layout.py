"""The files in which a model was, and is written again: the source's names, and its shards with an index."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from pared.artifact.envelope import FILE_NAMES
from pared.artifact.index import Entry
from pared.checkpoints.selection import Kept
from pared.errors import FileError, ParedError
from pared.files.disk import open_file
from pared.files.safetensors_file import is_safetensors, read_header
from pared.readers.folders.names import DISTRIBUTED, INDEX, MAIN, folder_of, numbered
from pared.readers.listing import Listing

log = logging.getLogger(__name__)

WEIGHTS: Final = "model.safetensors"  # the name that transformers looks for
_SUFFIX: Final = ".safetensors"
_RECORD: Final = "files"
_METADATA: Final = "metadata"
_PLAIN_METADATA: Final = {"format": "pt"}
_EXPANDED: Final = {"pared": "expanded"}  # stands in what `expand` writes, which it may therefore write again
_MOST_METADATA: Final = 1 << 20  # bytes
_MOST_FILES: Final = 10_000
_LONGEST: Final = 200
_PLAIN: Final = re.compile(r"(?!\.)[^\\\0:/]+$")


@dataclass(frozen=True)
class Layout:
    """The files of an expanded model.

    Args:
        files: the number of tensors in each, by relative path, in the order of the artifact's index.
        index: the index of shards; "" for a single file.
    """

    files: Mapping[str, int]
    index: str = ""

    @property
    def main(self) -> str:
        """The file that stands for the model."""
        return self.index or next(iter(self.files))

    def divided(self, entries: Sequence[Entry]) -> Iterator[tuple[str, Sequence[Entry]]]:
        """The tensors of each file."""
        start = 0
        for name, count in self.files.items():
            yield name, entries[start : start + count]
            start += count

    def index_bytes(self, entries: Sequence[Entry]) -> bytes:
        """The index, as libraries read it."""
        placed = {tensor: name for name, group in self.divided(entries) for entry in group for tensor in entry.names}
        inside = folder_of(self.index)
        total = sum(entry.source_nbytes * len(entry.names) for entry in entries)
        weight_map = {tensor: name.removeprefix(inside) for tensor, name in sorted(placed.items())}
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()


def single(count: int, name: str = WEIGHTS) -> Layout:
    """One file with all tensors."""
    return Layout({name: count})


def record(listing: Listing, kept: Sequence[Kept]) -> dict[str, Any]:
    """What an artifact says about the files that its tensors come from; empty if it need not say anything.

    Args:
        listing: the source.
        kept: its tensors, in the order of the artifact.
    """
    counts: dict[str, int] = {}
    last = ""
    for one in kept:
        key = one.held.storage or ""
        same = last and key.startswith(f"{last}/")  # the tensors of a file follow one another
        name = last if same else next((name for name in listing.files if key.startswith(f"{name}/")), "")
        if not name or name.endswith(DISTRIBUTED) or (name in counts and name != last):
            return {}
        counts[name] = counts.get(name, 0) + 1
        last = name
    names = [written_name(name) for name in counts]
    return (
        {}
        if names in ([], [WEIGHTS]) or len(set(names)) < len(names)
        else {_RECORD: [list(one) for one in counts.items()]}
    )


def metadata_of(listing: Listing) -> dict[str, Any]:
    """What an artifact keeps of the free text in its source, which `expand` writes again; empty if it says nothing."""
    said = dict(listing.metadata)
    nbytes = len(json.dumps(said))
    if nbytes > _MOST_METADATA:
        log.warning("%s: %s bytes of metadata are not kept", listing.where, f"{nbytes:,}")
        return {}
    return {} if said in ({}, _PLAIN_METADATA) else {_METADATA: said}


def written_metadata(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The free text of an expanded file; what a stranger wrote in its place that is not text is not taken."""
    recorded = provenance.get(_METADATA)
    said = recorded if isinstance(recorded, dict) else {}
    texts = {key: value for key, value in said.items() if isinstance(value, str)}
    return _PLAIN_METADATA | ({} if texts.get("format") == "pared" else texts) | _EXPANDED  # "pared": an artifact


def refuse_foreign(path: Path) -> None:
    """Refuse to replace a file that `expand` did not write: it may be the only exact copy of the weights.

    Raises:
        FileError: there is such a file.
    """
    if not os.path.isfile(path):  # noqa: PTH113  # never raises
        return
    with contextlib.suppress(ParedError), open_file(path) as file:
        if is_safetensors(file) and _EXPANDED.items() <= read_header(file).metadata.items():
            return
    raise FileError(
        "is there already, and expand did not write it: it may hold the exact weights",
        where=str(path),
        remedy="Choose another place to write to, or move that file away.",
    )


def layout_of(provenance: Mapping[str, Any], count: int, where: str) -> Layout:
    """The files in which an artifact was recorded to be; `model.safetensors` if it does not say, or not soundly.

    Args:
        provenance: what the artifact says about its source; a stranger may have written it.
        count: the number of its tensors.
        where: the artifact, for messages.
    """
    recorded = provenance.get(_RECORD)
    if recorded is None:
        return single(count)
    if not isinstance(recorded, list) or not 0 < len(recorded) <= _MOST_FILES or not _is_sound(recorded, count):
        log.warning("%s: what it says about the files of its source is not sound; %s is written", where, WEIGHTS)
        return single(count)
    files = {written_name(name): number for name, number in recorded}
    return Layout(files, _index_name(next(iter(files))) if len(files) > 1 else "")


def _is_sound(recorded: Sequence[Any], count: int) -> bool:
    if not all(isinstance(one, list) and len(one) == 2 for one in recorded):
        return False
    plain = all(
        isinstance(name, str)
        and len(name) <= _LONGEST
        and all(_PLAIN.match(part) for part in name.split("/"))
        and PurePosixPath(name).name not in FILE_NAMES.values()
        for name, _ in recorded
    )
    whole = all(type(number) is int and 0 <= number <= count for _, number in recorded)
    return (
        plain
        and whole
        and sum(number for _, number in recorded) == count
        and len({written_name(name) for name, _ in recorded}) == len(recorded)
    )


def written_name(name: str) -> str:
    """The name under which a file of weights is written again, which libraries open in the source's place.

    >>> written_name("pytorch_model-00001-of-00002.bin"), written_name("unet/diffusion_pytorch_model.fp16.safetensors")
    ('model-00001-of-00002.safetensors', 'unet/diffusion_pytorch_model.fp16.safetensors')
    """
    path = PurePosixPath(name)
    if path.name in FILE_NAMES.values():
        return folder_of(name) + WEIGHTS
    base = path.name if path.suffix == _SUFFIX else f"{path.stem}{_SUFFIX}"
    return folder_of(name) + (base.removeprefix("pytorch_") if base.startswith("pytorch_model") else base)


def _index_name(first: str) -> str:
    """The index of a set of shards, by the first of them.

    >>> _index_name("model.fp16-00001-of-00002.safetensors"), _index_name("unet/a.safetensors")
    ('model.safetensors.index.fp16.json', 'unet/model.safetensors.index.json')
    """
    part = numbered(first)
    if part is None:
        return f"{folder_of(first)}{WEIGHTS}{INDEX}"
    base = part.before.removeprefix(folder_of(first)).rstrip("-_.") or "model"
    stem, _, variant = base.partition(".")
    if f"{stem}{_SUFFIX}" not in MAIN:
        stem, variant = base, ""
    return f"{folder_of(first)}{stem}{_SUFFIX}.index{f'.{variant}' if variant else ''}.json"
