"""Artifacts of a model: `Contents` to bytes and back. `docs/format.md` is the specification."""

from __future__ import annotations

import functools
import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pared.artifact.envelope import FILE_NAMES, INDEX_FILE, Records, open_records
from pared.artifact.index import Entry, Index
from pared.artifact.parse import parse_index
from pared.artifact.parts import parts_of, placed
from pared.artifact.shards import check_shards, check_there, whole
from pared.artifact.torch_file import write_torch
from pared.errors import DANGEROUS, ConfigError, CorruptError, MismatchError, UnsafeError
from pared.files.disk import as_path, make_directory, write_atomic
from pared.files.memory_limit import MemoryLimit
from pared.files.safetensors_file import write_safetensors
from pared.files.threads import each
from pared.formats import coded as formats
from pared.formats import streams
from pared.formats.activation import Activation
from pared.formats.coded import RAW_TYPES, Coded, Grid, Raw, dtype_name
from pared.formats.encoded.codes import Undecoded
from pared.formats.grids import MOST_COLUMNS
from pared.formats.views import View, first_dimension
from pared.model.contents import Contents, Decision, Stored
from pared.model.state import tables
from pared.model.state.extra import ExtraState

log = logging.getLogger(__name__)

_NUMBER_NBYTES = 16  # what a number takes while it is decoded, at most


@dataclass(frozen=True, eq=False)
class Encoded:
    """An artifact as bytes, with what they are, so that nobody has to parse them.

    Args:
        file: the whole file.
        records: its records, under no name.
        index: what the first of them says.
    """

    file: bytes
    records: Records
    index: Index


def to_bytes(contents: Contents, kind: str = "pt") -> bytes:
    """Encode an artifact of a kind, "pt" or "safetensors": the same contents give the same bytes."""
    return encoded(contents, kind).file


def encoded(contents: Contents, kind: str = "pt") -> Encoded:
    """Encode an artifact as `to_bytes` does."""
    data = bytearray()
    tensors = [stored for stored in contents.tensors if stored.decision.treatment != "made"]
    left = [tables.made(one.names, one.coded.decode()) for one in contents.tensors if one.decision.treatment == "made"]
    tensors += [part for name, state in contents.states.items() for part in _parts_of(name, state)]
    work = [math.prod(stored.coded.shape) for stored in tensors]
    coded = each(lambda stored: stored.coded.format.streams(stored.coded), tensors, work)
    entries = tuple(_entry(stored, parts, data) for stored, parts in zip(tensors, coded, strict=True))
    modules = {name: activation.to_json() for name, activation in contents.activations.items()}
    states = {name: state.tree for name, state in contents.states.items()}
    index = Index(entries, modules, dict(contents.provenance), states, tuple(map(tables.to_json, left)))
    record, buffer = index.to_bytes(), io.BytesIO()
    if kind == "safetensors":
        write_safetensors(buffer, record, (bytes(data),), len(data))
    else:
        write_torch(buffer, record, (bytes(data),), len(data))
    file = buffer.getvalue()
    return Encoded(file, Records("", len(file), record, memoryview(data)), index)


def _parts_of(name: str, state: ExtraState) -> Iterator[Stored]:
    """The tensors of an extra state, as they are named in a file."""
    for i, tensor in enumerate(state.tensors):
        part = f"{name}/{i}"
        coded = Raw(dtype_name(tensor.dtype)).encode(tensor)
        yield Stored((part,), "state", coded, Decision(part, "exact", None, "extra state"))


def _entry(stored: Stored, pieces: Mapping[str, streams.EncodedPart], data: bytearray) -> Entry:
    """Append a tensor's streams to the data, and describe them."""
    coded = stored.coded
    parts = placed(pieces, len(data))
    for part, piece in zip(parts.values(), pieces.values(), strict=True):
        data.extend(bytes(part.offset - len(data)))
        data.extend(piece.payload)
    return Entry(
        names=stored.names,
        kind=stored.kind,
        dtype=dtype_name(coded.dtype),
        shape=coded.shape,
        format=coded.format.to_json(),
        view=(coded.view.split, coded.view.rows) if coded.view is not None else None,
        bits=stored.decision.bits,
        because=stored.decision.because,
        parts=parts,
    )


def encoded_alone(stored: Stored) -> tuple[Entry, bytes]:
    """Encode one tensor, decode it and compare every number.

    Returns:
        its entry in an index, where nothing stands before it; and its data.

    Raises:
        CorruptError: a number differs.
    """
    data = bytearray()
    entry = _entry(stored, stored.coded.format.streams(stored.coded), data)
    _compare(stored, _stored(memoryview(data), entry))
    return entry, bytes(data)


def from_bytes(data: bytes, *, undecoded: bool = False) -> Contents:
    """The inverse of `to_bytes`.

    Args:
        data: the file.
        undecoded: see `read`.

    Raises:
        CorruptError, UnsafeError, VersionError: see `read`.
    """
    with open_records(data) as records:
        return _contents(records, undecoded=undecoded)


def read(path: Path, numbers: int | None = None, *, undecoded: bool = False) -> Contents:
    """Read an artifact.

    Args:
        path: the file, or the index of its shards.
        numbers: how many the model has that it is for, which bounds what decoding takes; None: the file is our own.
        undecoded: whether codes of grids without groups stay bytes; each is decoded once even so, to check it.

    Raises:
        FileError: there is no such file, or it is not an artifact.
        CorruptError: its bytes contradict themselves.
        MismatchError: it describes far more numbers than the model has.
        UnsafeError: it would inflate without bound.
        VersionError: a newer version wrote it.
    """
    if path.name == INDEX_FILE:
        return _joined(path, numbers, undecoded)
    with open_records(path) as records:
        return _contents(records, numbers, undecoded=undecoded)


def _joined(index: Path, numbers: int | None, undecoded: bool) -> Contents:
    """The contents of shards, one after the other."""
    found = [read(path, numbers, undecoded=undecoded) for path in check_there(index)]
    check_shards(index, [one.provenance for one in found])
    return Contents(
        tuple(stored for one in found for stored in one.tensors),
        {name: activation for one in found for name, activation in one.activations.items()},
        whole(found[0].provenance),
        {name: state for one in found for name, state in one.states.items()},
        tuple(made for one in found for made in one.made),
    )


def _contents(records: Records, numbers: int | None = None, *, undecoded: bool = False) -> Contents:
    index = parse_index(records)
    if numbers is not None:
        _check_numbers(index, records, numbers)
    read_one = functools.partial(_stored, records.data, undecoded=undecoded)
    found = tuple(each(read_one, index.entries, [entry.elements for entry in index.entries]))
    tensors = tuple(stored for stored in found if stored.kind != "state")
    parts = {stored.name: stored.coded.decode() for stored in found if stored.kind == "state"}
    states = {name: ExtraState(tree, _in_order(name, parts)) for name, tree in index.states.items()}
    activations = {name: Activation.from_json(dict(value)) for name, value in index.modules.items()}
    _check_outliers(tensors, activations)
    return Contents(tensors, activations, dict(index.provenance), states, tables.from_json(index.made))


def _in_order(name: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The tensors of one extra state, in their order."""
    found: list[Tensor] = []
    while (part := parts.get(f"{name}/{len(found)}")) is not None:
        found.append(part)
    return tuple(found)


def _check_numbers(index: Index, records: Records, numbers: int) -> None:
    """Refuse far more numbers than a model has, before any is decoded: those of a few bytes may be very many."""
    described = sum(max(entry.elements, entry.n_rows, entry.n_lines) for entry in index.entries)
    free = MemoryLimit(records.where, records.nbytes).left // _NUMBER_NBYTES
    if described > numbers + free:
        raise MismatchError(
            f"describes {described:,} numbers, and the model has {numbers:,}",
            where=records.where,
            remedy="Pass the architecture that it was made from; if you have, do not use this file.",
        )


def _check_outliers(tensors: Sequence[Stored], activations: Mapping[str, Activation]) -> None:
    """Refuse outliers that are not columns of the weight they meet, or are more than the kernels can take."""
    shapes = {name: one.coded.shape for one in tensors for name in one.names}
    for module, activation in activations.items():
        for attribute in activation.weights if activation.outliers else ():
            shape = shapes.get(f"{module}.{attribute}".removeprefix("."), ())
            if len(shape) != 2 or any(column >= shape[1] for column, _ in activation.outliers):
                raise CorruptError(
                    f"the outliers of its input are not columns of {attribute!r}", where=module or "the root"
                )
            more = sum(abs(count) for _, count in activation.outliers)
            if more > min(shape[1], MOST_COLUMNS - shape[1]):
                raise UnsafeError(
                    f"{shape[1]} columns of {attribute!r} would get {more:,} extra ones",
                    where=module or "the root",
                    remedy=DANGEROUS,
                )


def _stored(data: memoryview, entry: Entry, *, undecoded: bool = False) -> Stored:
    found = parts_of(entry, data)
    format = formats.from_json(entry.format, entry.dtype)
    view = View(*entry.view) if entry.view is not None else None
    try:
        parts: Mapping[str, Tensor] = format.parts(found, entry.shape, view)
    except CorruptError as error:
        raise CorruptError(error.what, where=entry.name, remedy=error.remedy) from error
    if undecoded and isinstance(format, Grid):
        lines = view or first_dimension(entry.shape)
        parts = Undecoded.of(parts, found, lines.across if format.scaled else lines)
    coded = Coded(format, entry.shape, RAW_TYPES[entry.dtype], parts, view)
    treatment: Any = {"grid": "grid", "groups": "grid", "raw": "exact"}.get(format.tag) or entry.format["dtype"]
    kind: Any = entry.kind  # the index has been checked
    return Stored(entry.names, kind, coded, Decision(entry.name, treatment, entry.bits, entry.because))


def place(directory: str | Path, kind: str = "pt") -> Path:
    """Where the artifact of a directory stands; the directory is made if it is missing.

    Args:
        directory: where to write.
        kind: the container, "pt" or "safetensors".

    Raises:
        ConfigError: an unknown container.
        FileError: the directory cannot be written.
    """
    if kind not in FILE_NAMES:
        raise ConfigError(
            f"container={kind!r} is not one of {', '.join(map(repr, FILE_NAMES))}",
            where="save",
            remedy="Choose one of them.",
        )
    path = as_path(directory, "save") / FILE_NAMES[kind]
    make_directory(path.parent)
    return path


def verified(contents: Contents, kind: str) -> Encoded:
    """Encode an artifact as `to_bytes` does, decode the bytes and compare every number.

    Raises:
        CorruptError: one differs.
    """
    made = encoded(contents, kind)
    _verify(contents, made.file)
    return made


def _verify(contents: Contents, data: bytes) -> None:
    stored = [one for one in contents.tensors if one.decision.treatment != "made"]
    for ours, theirs in zip(stored, from_bytes(data).tensors, strict=True):
        _compare(ours, theirs)


def _compare(ours: Stored, theirs: Stored) -> None:
    same = all(_same(ours.coded.parts[k], theirs.coded.parts[k]) for k in ours.coded.parts)
    if ours.names != theirs.names or not same:
        raise CorruptError(
            "what would be written does not read back as it was",
            where=ours.name,
            remedy="This is a defect of pared: please report it with the model's architecture.",
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes: NaN equals itself, and -0.0 is not 0.0."""
    if not a.is_floating_point() and not a.is_complex():
        return torch.equal(a, b)
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor


def write_beside(path: Path, name: str, content: bytes | str) -> None:
    """Write a file next to an artifact, atomically."""
    data = content.encode() if isinstance(content, str) else content
    write_atomic(path.with_name(name), lambda file: file.write(data))
