"""Whatever holds a model's tensors, in one form: a file, a folder, an artifact, a state dict, a model in memory."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from pared import readers
from pared.artifact.decoding import decode
from pared.artifact.envelope import Records, artifact_in, open_records, records_of
from pared.artifact.parse import parse_index
from pared.errors import ConfigError
from pared.files.disk import as_path, open_file
from pared.formats.dtypes import ELEMENTS, Array
from pared.readers.listing import ListedTensor, Listing


@dataclass(frozen=True, eq=False)
class Piece:
    """One tensor of a source.

    Args:
        name: in the source.
        dtype: the type of its numbers as `read` gives them, in torch's words.
        shape: the tensor's shape.
        format: a short name of how they are stored: "grid int8", "float32".
        nbytes: that it takes in the source; 0 for one whose numbers an earlier piece counts.
        read: gives the numbers, mapped where that is possible; None where there are none that can be read.
        place: equal for two pieces with the same numbers in memory or file.
        note: what a reader has to know about the numbers.
        by_columns: for a square of codes, which does not say whether its steps belong to rows, as `read` takes it, or
            to columns: the numbers if it is columns.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    read: Callable[[], Array | None]
    place: object = None
    note: str = ""
    by_columns: Callable[[], Array | None] | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """What is compared.

    Args:
        name: the path, or the class of a model.
        nbytes: the size of the file or files, or of the model's tensors.
        pieces: every tensor, by each of its names.
    """

    name: str
    nbytes: int
    pieces: tuple[Piece, ...]


def is_model(target: object) -> bool:
    """Whether something is a `torch.nn.Module`; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(target, torch.nn.Module)


@contextmanager
def open_source(target: object, where: str) -> Iterator[Source]:
    """The tensors of anything that has some; they can be read as long as it is open.

    Args:
        target: a path, a `torch.nn.Module`, float or quantized, or a state dict.
        where: what the caller calls it, for messages.

    Raises:
        ConfigError: it is none of these.
        FileError: the file cannot be read, or is of a kind that cannot be listed.
        CorruptError, UnsafeError, VersionError: as `inspect`.
    """
    if isinstance(target, str | os.PathLike):
        with _open_path(as_path(target, where)) as source:
            yield source
    elif hasattr(type(target), "_pared_artifact"):
        quantized: Any = target
        with open_records(quantized._pared_artifact(), type(target).__name__) as records:
            yield _of_records(records)
    elif is_model(target):
        model: Any = target
        tensors = (f(remove_duplicate=False) for f in (model.named_parameters, model.named_buffers))
        yield _of_tensors(type(target).__name__, {name: one for named in tensors for name, one in named})
    elif _is_state(target):
        yield _of_tensors("state dict", target)  # type: ignore[arg-type]  # just asked
    else:
        raise ConfigError(
            f"expected a path, a torch.nn.Module or a state dict, got {type(target).__name__}",
            where=where,
            remedy="Pass the path of a file or folder, a model, or model.state_dict().",
        )


def _is_state(target: object) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(target, Mapping):
        return False
    return any(isinstance(value, torch.Tensor) for value in target.values())


@contextmanager
def _open_path(path: Path) -> Iterator[Source]:
    saved = artifact_in(path)
    if saved.is_dir():
        with readers.open_listing(path) as listing:
            yield _of_listing(listing)
        return
    with open_file(saved) as file:
        records = records_of(file)
        if records is not None:
            yield _of_records(records)
            return
    with readers.open_listing(path) as listing:
        yield _of_listing(listing)


# --- an artifact


def _of_records(records: Records) -> Source:
    pieces: list[Piece] = []
    for entry in parse_index(records).entries:
        read = functools.partial(decode, entry, records.data)
        first = Piece(entry.name, entry.dtype, entry.shape, entry.label, entry.nbytes, read, entry.name)
        pieces += [first, *(replace(first, name=alias, nbytes=0) for alias in entry.names[1:])]
    return Source(records.where, records.nbytes, tuple(pieces))


# --- another file, or a folder

# Types of codes whose scales stand elsewhere.
_SCALED: Final = ("qint8", "quint8", "qint32")


def _of_listing(listing: Listing) -> Source:
    pieces: list[Piece] = []
    seen: set[object] = set()
    for held in listing.tensors:
        place = (held.storage, held.offset, held.shape, held.stride) if held.storage is not None else None
        nbytes = 0 if place in seen else held.nbytes
        seen |= {place} - {None}
        read = functools.partial(listing.array, held)
        pieces.append(Piece(held.name, held.dtype, held.shape, held.dtype, nbytes, read, place, _note(held)))
    return Source(listing.where, listing.nbytes, tuple(_decoded(pieces)))


def _note(held: ListedTensor) -> str:
    if held.storage is None:
        return "on the meta device: it holds no numbers"
    if held.dtype in _SCALED:
        return "codes, whose scales are not read: they compare with codes only"
    return "" if held.dtype in ELEMENTS else f"{held.dtype}: numbers in blocks, which are not read"


# --- codes and steps, as the state dict of a quantized model has them

_STEP: Final = "_step"  # behind the name of a tensor of codes
_CODES: Final = ("int8", "int16")


def _decoded(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Codes and their steps as one piece: `value = step[row] * code`."""
    by_name = {piece.name: piece for piece in pieces}
    steps = {
        piece.name: step
        for piece in pieces
        if piece.dtype in _CODES and (step := by_name.get(f"{piece.name}{_STEP}")) and step.dtype == "float32"
    }
    taken = {step.name for step in steps.values()}
    for piece in pieces:
        if piece.name in steps:
            yield _of_codes(piece, steps[piece.name])
        elif piece.name not in taken:
            yield piece


def _of_codes(codes: Piece, step: Piece) -> Piece:
    joined = replace(codes, nbytes=codes.nbytes + step.nbytes)
    rows = [i for i, n in enumerate(codes.shape) if step.shape == (n,)]
    if step.shape and not rows:
        note = "codes, whose steps do not say which rows they belong to: they compare with codes only"
        return replace(joined, note=note)
    reads = [functools.partial(_on_grid, codes, step, row) for row in rows or (None,)]
    by_columns = reads[1] if len(reads) > 1 else None
    return replace(joined, dtype="float32", format=f"grid {codes.dtype}", read=reads[0], by_columns=by_columns)


def _on_grid(codes: Piece, step: Piece, row: int | None) -> Array | None:
    numbers, steps = codes.read(), step.read()
    if numbers is None or steps is None:
        return None
    values: Array = numbers.astype(np.float32)
    values *= steps.reshape([n if i == row else 1 for i, n in enumerate(codes.shape)])
    return values


# --- tensors in memory


def _of_tensors(name: str, tensors: Mapping[str, Any]) -> Source:
    pieces: list[Piece] = []
    seen: set[object] = set()
    torch = sys.modules["torch"]
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue  # state dicts hold other things too: a version, an extra state
        dtype = str(tensor.dtype).removeprefix("torch.")
        place = _place_of(tensor)
        nbytes = 0 if place in seen else tensor.numel() * tensor.element_size()
        seen.add(place)
        decoded = "float32" if tensor.is_quantized else dtype
        note = "on the meta device: it holds no numbers" if tensor.is_meta else ""
        read = functools.partial(array_of, tensor)
        pieces.append(Piece(str(key), decoded, tuple(tensor.shape), dtype, nbytes, read, place, note))
    return Source(name, sum(piece.nbytes for piece in pieces), tuple(_decoded(pieces)))


def _place_of(tensor: Any) -> object:
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    try:
        return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors hide theirs
        return id(tensor)


def array_of(tensor: Any) -> Array | None:
    """The numbers of a tensor in memory, as `Listing.array` gives those of a file; None on the meta device.

    Args:
        tensor: a `torch.Tensor`, of any layout and on any device; one that is quantized is decoded.
    """
    if tensor.is_meta:
        return None
    tensor = tensor.detach()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    tensor = tensor.to_dense() if str(tensor.layout) != "torch.strided" else tensor
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    kind = ELEMENTS[str(tensor.dtype).removeprefix("torch.")]
    torch = sys.modules["torch"]
    if kind.isbuiltin != 1:  # torch hands over the types of NumPy itself
        tensor = tensor.contiguous().view(torch.int16 if kind.itemsize == 2 else torch.uint8)
    array: Array = tensor.numpy().view(kind)
    return array
