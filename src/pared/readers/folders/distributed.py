"""Checkpoints of `torch.distributed.checkpoint`: a folder of `.distcp` files, and `.metadata` that says what is where.

`.metadata` is a pickle, which is read without running anything. Each tensor is divided into chunks along any of its
dimensions; a chunk is a file of `torch.save` at an offset in one of the `.distcp` files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final, NoReturn

import numpy as np

from pared.errors import FileError
from pared.files.checks import Place
from pared.files.disk import open_file, part_of
from pared.files.memory_limit import MemoryLimit
from pared.files.pickles import Name, Node, read_pickle
from pared.formats.dtypes import ELEMENTS, TYPES, Array, bytes_of
from pared.readers.folders.files import find_files
from pared.readers.folders.names import CHUNKS, DISTRIBUTED
from pared.readers.kinds import list_tensors
from pared.readers.listing import ListedTensor, Listing, Note, Storage, stray
from pared.readers.torch.names import HARMLESS

_PLACE: Final = "torch.distributed.checkpoint."
_TENSOR: Final = f"{_PLACE}metadata.TensorStorageMetadata"
_ROOT: Final = f"{_PLACE}metadata.Metadata"
_KNOWN: Final = HARMLESS | {
    _ROOT, _TENSOR, f"{_PLACE}filesystem._StorageInfo", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
    *(f"{_PLACE}metadata.{name}" for name in (
        "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )),
}  # fmt: skip
_ELSEWHERE: Final = (
    "Turn it into one file where it was written: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
    "FOLDER model.pt"
)
_HELD_NBYTES: Final = 2000  # of Python's objects for a tensor, beside its name
_CHUNK_NBYTES: Final = 1000

_Key = tuple[str, tuple[int, ...] | None]  # a tensor's name, and the place of a chunk in it


@dataclass(frozen=True)
class _Span:
    """Bytes of a file that hold one chunk, or one object.

    Args:
        file: the file's path relative to the folder.
        begin: the offset of its first byte.
        end: the offset after its last byte.
    """

    file: str
    begin: int
    end: int


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor.

    Args:
        offsets: its place in the tensor, in each dimension.
        sizes: its shape.
        span: where it stands.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    span: _Span


@dataclass
class _Checkpoint:
    """What `.metadata` says.

    Args:
        folder: the checkpoint's.
        spans: where each chunk and object stands; those that are not taken in the end are objects.
        sizes: the size of each file that is named, in bytes.
    """

    folder: Path
    spans: dict[_Key, _Span] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


def list_checkpoint(folder: Path) -> Listing:
    """List the tensors of a checkpoint, under their names in the nested dictionaries that were saved.

    A tensor of one chunk is read in place; the chunks of others are put together when its numbers are read.

    Raises:
        FileError: a file is missing, or chunks are stored in a way that is not read.
        CorruptError: it contradicts itself.
        UnsafeError: the metadata cannot be interpreted, or listing it would exceed the memory limit.
    """
    present = find_files(folder, deep=False).sizes
    path = folder / DISTRIBUTED
    if DISTRIBUTED not in present:
        _refuse_without(folder, present)
    at = Place(str(path))
    with open_file(path) as file:
        nbytes = sum(size for name, size in present.items() if name.endswith(CHUNKS)) + len(file.data)
        memory = MemoryLimit(str(path), nbytes)
        pickled = read_pickle(file.data, _KNOWN, str(path), memory)
        metadata = len(file.data)
    top = _fields(pickled.root, "it", at)
    if not (isinstance(pickled.root, Node) and pickled.root.call == Name(_ROOT)):
        at.fail("it is not the metadata of torch.distributed.checkpoint")
    checkpoint = _Checkpoint(folder)
    for key, info in _pairs(top.get("storage_data"), "its storage_data", at):
        memory.take(_CHUNK_NBYTES)
        _add_span(checkpoint, key, info, at)
    paths = _paths(top.get("planner_data"), at)
    spans = list(checkpoint.spans.values())
    tensors, storages = [], {}
    for fqn, described in _pairs(top.get("state_dict_metadata"), "its state_dict_metadata", at):
        if not isinstance(fqn, str):
            at.fail("the name of a tensor is not text")
        if not (isinstance(described, Node) and described.call == Name(_TENSOR)):
            continue
        name = paths.get(fqn, fqn)
        memory.take(_HELD_NBYTES + len(name) + len(fqn))
        held, chunks = _tensor(checkpoint, fqn, name, _fields(described, fqn, at), memory)
        if held.name in storages:
            at.fail(f"two of its tensors have the name {held.name[:80]!r}")
        tensors.append(held)
        read = partial(_content, checkpoint, held, chunks) if held.dtype in ELEMENTS else None
        stored = sum(chunk.span.end - chunk.span.begin for chunk in chunks)
        storages[held.name] = Storage(stored, read, coded=True)
    objects = sum(span.end - span.begin for span in checkpoint.spans.values())
    return Listing(
        tuple(tensors),
        storages,
        {
            "(metadata)": Note(metadata),
            "(objects)": Note(objects, "values other than tensors, as pickles: not read"),
            **_stray(checkpoint, spans),
        },
        pickled.imports,
        where=str(folder),
        nbytes=metadata + sum(checkpoint.sizes.values()),
        kind="a checkpoint of torch.distributed.checkpoint",
        beside=tuple(checkpoint.sizes),
    )


def _refuse_without(folder: Path, present: Mapping[str, int]) -> NoReturn:
    apart = next((name for name in present if name.endswith(DISTRIBUTED)), "")
    raise FileError(
        "has the chunks of a checkpoint of torch.distributed.checkpoint without its file .metadata, which says which "
        f"tensors they belong to{f' (there is {apart}, of one process alone)' if apart else ''}",
        where=str(folder),
        remedy="Fetch .metadata as well (names that begin with a dot are easily left behind). " + _ELSEWHERE,
    )


def _add_span(checkpoint: _Checkpoint, key: object, info: object, at: Place) -> None:
    index = _fields(key, "a key of its storage_data", at)
    fqn = at.text(index.get("fqn"), "the name of a tensor")
    offset = index.get("offset")
    place = None if offset is None else _sizes(offset, f"a chunk of {fqn[:80]!r}", at)
    at = Place(f"{at.place}: {fqn}")
    fields = _fields(info, "its place", at)
    if _values(fields.get("transform_descriptors")):
        raise FileError("is stored in a coding that pared does not read", where=at.place, remedy=_ELSEWHERE)
    name = at.text(fields.get("relative_path"), "the name of its file")
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or "\\" in name or ".." in parts or PurePosixPath(name).is_absolute():
        at.fail(f"it is said to be in {name[:80]!r}, which is not a path inside the folder")
    begin, length = at.whole(fields.get("offset"), "its offset"), at.whole(fields.get("length"), "its length")
    if name not in checkpoint.sizes:
        path = checkpoint.folder / name
        if not path.is_file():
            raise FileError(
                f"is in {name[:80]!r}, which is missing", where=at.place, remedy=f"Put {name[:80]} into the folder."
            )
        checkpoint.sizes[name] = path.stat().st_size
    if begin + length > checkpoint.sizes[name]:
        at.fail(f"it ends at byte {begin + length:,} of {name[:80]!r}, which has {checkpoint.sizes[name]:,}")
    if (fqn, place) in checkpoint.spans:
        at.fail("it has two places")
    checkpoint.spans[fqn, place] = _Span(name, begin, begin + length)


def _tensor(
    checkpoint: _Checkpoint, fqn: str, name: str, fields: Mapping[str, object], memory: MemoryLimit
) -> tuple[ListedTensor, list[_Chunk]]:
    """A tensor, and its chunks, which are taken from the spans."""
    at = Place(f"{checkpoint.folder / DISTRIBUTED}: {name}")
    properties = fields.get("properties")
    states = properties.states if isinstance(properties, Node) else ()
    kind = next(iter(_values(states[0])), None) if states else None
    dtype = kind.path.removeprefix("torch.") if isinstance(kind, Name) else ""
    if dtype not in TYPES:
        at.fail("its element type is not one of torch's")
    shape = at.shape(list(_sizes(fields.get("size"), "its size", at)), "size")
    chunks: dict[tuple[int, ...], _Chunk] = {}
    for one in _values(fields.get("chunks")):
        memory.take(_CHUNK_NBYTES)
        described = _fields(one, "a chunk", at)
        offsets, sizes = (_sizes(described.get(key), f"the {key} of a chunk", at) for key in ("offsets", "sizes"))
        inside = len(offsets) == len(sizes) == len(shape) and all(
            offset + size <= whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)
        )
        if not inside:
            at.fail(f"it has a chunk outside its shape: {list(sizes)} at {list(offsets)}")
        span = checkpoint.spans.pop((fqn, offsets), None) or checkpoint.spans.pop((fqn, None), None)
        if math.prod(sizes) == 0:
            continue
        if span is None or offsets in chunks:
            at.fail(f"its chunk at {list(offsets)} is in no file" if span is None else "two of its chunks overlap")
        if (span.end - span.begin) * 8 < math.prod(sizes) * TYPES[dtype].bits:
            at.fail(f"its chunk at {list(offsets)} has too few bytes")
        chunks[offsets] = _Chunk(offsets, sizes, span)
    if sum(math.prod(chunk.sizes) for chunk in chunks.values()) != math.prod(shape):
        at.fail("its chunks do not fill it: some are missing, or overlap")
    nbytes = -(-math.prod(shape) * TYPES[dtype].bits // 8)
    return ListedTensor(name, dtype, shape, nbytes, name), list(chunks.values())


def _content(checkpoint: _Checkpoint, held: ListedTensor, chunks: Sequence[_Chunk]) -> memoryview:
    """The numbers of a tensor."""
    if len(chunks) == 1:
        return bytes_of(_read(checkpoint, held, chunks[0]))
    whole = np.empty(held.shape, ELEMENTS[held.dtype])
    filled = np.zeros(held.shape, np.bool_)
    for chunk in chunks:
        place = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[place] = _read(checkpoint, held, chunk)
        filled[place] = True
    if not filled.all():
        Place(f"{checkpoint.folder}: {held.name}").fail("two of its chunks overlap")
    return bytes_of(whole)


def _read(checkpoint: _Checkpoint, held: ListedTensor, chunk: _Chunk) -> Array:
    """The numbers of a chunk; they stay mapped as long as the array is held."""
    path, where = checkpoint.folder / chunk.span.file, f"{checkpoint.folder}: {held.name}"
    with open_file(path, where) as file:
        inner = list_tensors(part_of(file, chunk.span.begin, chunk.span.end))
        found = inner.array(inner.tensors[0]) if len(inner.tensors) == 1 else None
        if found is None or found.shape != chunk.sizes or inner.tensors[0].dtype != held.dtype:
            Place(where).fail(f"its chunk at {list(chunk.offsets)} is not what the metadata says")
        return found


def _stray(checkpoint: _Checkpoint, spans: Sequence[_Span]) -> dict[str, Note]:
    """The bytes of the files that are neither of a chunk nor of an object."""
    by_file: dict[str, list[tuple[int, int]]] = {name: [] for name in checkpoint.sizes}
    for span in spans:
        by_file[span.file].append((span.begin, span.end))
    notes: dict[str, Note] = {}
    for name, nbytes in checkpoint.sizes.items():
        end, outside = 0, 0
        with open_file(checkpoint.folder / name) if nbytes else open_file(b"") as file:
            for begin, after in [*sorted(by_file[name]), (nbytes, nbytes)]:
                if begin < end and after > begin:
                    Place(str(checkpoint.folder / name)).fail("two of its chunks overlap")
                outside += sum(note.nbytes for note in stray(file.data, end, begin, "").values())
                end = max(end, after)
        if outside:
            notes[f"(bytes of {name})"] = Note(outside, f"in {name}, and belong to no tensor", stray=True)
    return notes


def _paths(value: object, at: Place) -> dict[str, str]:
    """The nested dictionaries' keys to each tensor, joined by slashes; empty if they were not recorded."""
    found: dict[str, str] = {}
    for fqn, path in value.pairs if isinstance(value, Node) else ():
        keys = _values(path)
        plain = all(isinstance(key, str) or (isinstance(key, int) and abs(key) < 1 << 63) for key in keys)
        if isinstance(fqn, str) and keys and plain:
            found[fqn] = at.text("/".join(map(str, keys)), "the name of a tensor")
    return found


def _pairs(value: object, what: str, at: Place) -> Iterator[tuple[object, object]]:
    yield from value.pairs if isinstance(value, Node) else at.fail(f"{what} is not a dictionary")


def _fields(value: object, what: str, at: Place) -> dict[str, object]:
    """The attributes that an object would get."""
    if not isinstance(value, Node):
        at.fail(f"{what} is not an object")
    states = (state for state in value.states if isinstance(state, Node))
    return {key: one for state in states for key, one in state.pairs if isinstance(key, str)}


def _values(value: object) -> Sequence[object]:
    return value.values if isinstance(value, Node) else ()


def _sizes(value: object, what: str, at: Place) -> tuple[int, ...]:
    """The numbers of a `torch.Size`."""
    if not isinstance(value, Node):
        at.fail(f"{what} is not a size")
    inner = value.arguments[0] if value.arguments else value
    return tuple(at.whole(one, what) for one in _values(inner))
