"""What every reader returns: the tensors of a file, the storages of their numbers, and what else takes bytes.

Numbers are read only on request, as NumPy arrays, memory-mapped wherever the file stores them plainly. Nothing here
uses torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from pared.errors import FileError
from pared.files.disk import File
from pared.formats.dtypes import ELEMENTS, Array


@dataclass(frozen=True, slots=True)
class ListedTensor:
    """A tensor in a file or in memory.

    Args:
        name: the path to it, with a slash between nested dictionaries: "state_dict/encoder.weight".
        dtype: the element type by torch's name ("float32"), or by the file's own name if torch has none ("Q4_1").
        shape: the tensor's shape.
        nbytes: the size of its elements, before any compression of the storage; of a tensor that reading decodes, the
            size of what is decoded.
        storage: the key of the storage that holds them, possibly shared with other tensors; None if it has no numbers
            (a tensor on the meta device).
        offset: the position of its first element in the content of the storage, in bytes.
        stride: the distance between neighbours in each dimension, in elements; None: contiguous, in C order.
        format: a short name of how the numbers are stored, if it is not `dtype` as which they are read: "grid int8".
        key: its key in the innermost dictionary, at the end of `name`, if there are slashes in the key itself.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    storage: str | None
    offset: int = 0
    stride: tuple[int, ...] | None = None
    format: str = ""
    key: str = ""

    @property
    def label(self) -> str:
        """How the numbers are stored, for tables."""
        return self.format or self.dtype

    @property
    def place(self) -> object:
        """Equal for two tensors of a listing that are the same numbers; None if it has none."""
        return None if self.storage is None else (self.storage, self.offset, self.shape, self.stride)


@dataclass(frozen=True, eq=False, slots=True)
class Stretch:
    """Bytes of a file as they are: what `Storage.content` is where numbers are stored plainly, in little memory."""

    data: memoryview
    begin: int
    end: int

    def __call__(self) -> memoryview:
        """The bytes, which are not copied."""
        return self.data[self.begin : self.end]


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """Bytes in a file that hold the numbers of one or more tensors.

    Args:
        nbytes: the size in the file.
        content: returns the bytes of the numbers, decompressed if necessary; None if they cannot be read.
        coded: whether the numbers are compressed or otherwise coded, so that `nbytes` does not tell their count.
        need: the bytes of memory that `content` takes in proportion to the numbers, not to the file; 0: none.
        pieces: gives the numbers in C order, in pieces of one dimension, in little memory; None: only `content` does.
    """

    nbytes: int
    content: Callable[[], memoryview] | None = None
    coded: bool = False
    need: int = 0
    pieces: Callable[[], Iterator[Array]] | None = None


EXTRA_STATE: Final = "_extra_state"  # what torch calls the extra state of a module, behind the module's name


@dataclass(frozen=True, eq=False)
class ListedState:
    """The extra state of a module, in a file.

    Args:
        tree: as JSON values, see `docs/format.md`.
        parts: the tensors and bytes that the tree refers to, by their place.
        problem: why it cannot be stored; empty if it can be.
    """

    tree: Any
    parts: tuple[ListedTensor | bytes, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Note:
    """Something in a file, other than a tensor, that takes bytes.

    Args:
        nbytes: its size.
        because: an explanation for users, if one is needed.
        ballast: whether the model works without it.
        file: whether it is a complete file of a folder.
        stray: whether it belongs to no tensor and to no part of the format: a file that was appended to another, for
            example. What it holds may be missing from the listing.
    """

    nbytes: int
    because: str = ""
    ballast: bool = False
    file: bool = False
    stray: bool = False


@dataclass(frozen=True)
class Split:
    """What a file says about the model of which it holds only some tensors.

    Args:
        number: which of the files it is, from 0.
        count: the number of files.
        tensors: the number of tensors in all files together; None if it does not say.
    """

    number: int
    count: int
    tensors: int | None = None


@dataclass(frozen=True)
class Listing:
    """All tensors of a file, or of the files of a folder.

    Args:
        tensors: in the file's order.
        storages: by key, including those that no tensor uses.
        notes: what else takes bytes, by a name in parentheses: "(header)"; in a folder "(model.safetensors: header)"
            and "(config.json)".
        imports: functions and classes that loading would import, beyond those that tensors need: "os.system".
        where: the path, or another name for error messages.
        nbytes: the total size of all files.
        kind: a description of what was read: "a .safetensors file", "a Hugging Face folder".
        beside: other files that hold some of the numbers, as paths relative to the file's folder.
        flat: whether the file has no nested dictionaries, so that a slash is an ordinary character of a name.
        files: where several files were read: those that hold the model, by the names with which the keys of their
            storages begin. Empty for a single file, and for a folder of several models.
        split: what the file says if it is one of several.
        world: the number of processes over which the tensors of the model are divided, if the file says so.
        states: extra state of modules, by name. Tensors in it are also in `tensors`.
        metadata: free text by key, as .safetensors files have it; of several files what all of the model's say.
        plain: the outermost entries of a checkpoint that lead to no tensor: the number of an epoch, options.
    """

    tensors: tuple[ListedTensor, ...]
    storages: Mapping[str, Storage] = field(default_factory=dict)
    notes: Mapping[str, Note] = field(default_factory=dict)
    imports: tuple[str, ...] = ()
    where: str = ""
    nbytes: int = 0
    kind: str = ""
    beside: tuple[str, ...] = ()
    flat: bool = False
    files: Mapping[str, Path] = field(default_factory=dict)
    split: Split | None = None
    world: int | None = None
    states: Mapping[str, ListedState] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    plain: tuple[str, ...] = ()

    @property
    def stray(self) -> dict[str, Note]:
        """The bytes of the model's files that belong to no tensor and to no part of the format, by name."""
        inside = tuple(f"({name}: " for name in self.files)
        return {
            name: note for name, note in self.notes.items() if note.stray and (not inside or name.startswith(inside))
        }

    def array(self, held: ListedTensor) -> Array | None:
        """The numbers of a tensor, memory-mapped where the file stores them plainly.

        Args:
            held: one of `tensors`.

        Returns:
            an array of the tensor's shape, of a type in `formats.dtypes.ELEMENTS`; strides of 0 may make it far larger
            than its storage. None if the file has no numbers for it, stores them in blocks that are not decoded, or
            has them compressed beyond the memory limit.

        Raises:
            CorruptError: they cannot be read.
        """
        storage = None if held.storage is None else self.storages[held.storage]
        if storage is None or storage.content is None or held.dtype not in ELEMENTS:
            return None
        kind = ELEMENTS[held.dtype]
        content = storage.content()
        if held.stride is None:
            flat = np.frombuffer(content, kind, count=math.prod(held.shape), offset=held.offset)
            return flat.reshape(held.shape)
        flat = np.frombuffer(content, kind, count=(len(content) - held.offset) // kind.itemsize, offset=held.offset)
        strides = [step * kind.itemsize for step in held.stride]
        return np.lib.stride_tricks.as_strided(flat, held.shape, strides, writeable=False)


_PADDING: Final = 1 << 16  # the largest alignment of any format, in bytes


def stray(data: memoryview, begin: int, end: int, what: str) -> dict[str, Note]:
    """A note for bytes of a file that belong to nothing in it; none for the zeros of an alignment.

    Args:
        data: the file.
        begin: the offset of the first of these bytes.
        end: the offset after the last.
        what: where they are: "after its last tensor".
    """
    nbytes = end - begin
    if nbytes <= 0 or (nbytes < _PADDING and bytes(data[begin:end]).count(0) == nbytes):
        return {}
    return {f"(bytes {what})": Note(nbytes, f"{what}, and belong to no tensor", stray=True)}


def unknown(file: File, kind: str) -> FileError:
    """The error for a file that has no reader."""
    return FileError(
        f"is {kind}, which pared cannot read",
        where=file.where,
        remedy="Pass a file of torch, safetensors, ONNX, GGUF or NumPy, or a folder of such files.",
    )
