"""Tensors written to `.safetensors` files one after the other, in shards with an index as Hugging Face's loaders read.

Where each tensor stands is known before its numbers are, so that one is in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from pared.files.disk import write_atomic
from pared.files.safetensors_file import encoded_header
from pared.formats.dtypes import ELEMENTS, TYPES, Array, bytes_of

MAX_SHARD_SIZE: Final = 5_000_000_000  # bytes, as in transformers
_ALIGNMENT: Final = 8  # of the data, as the library has it
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor as it will stand in a file.

    Args:
        name: in the file.
        dtype: the element type by torch's name.
        shape: the tensor's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of its numbers."""
        return math.prod(self.shape) * ELEMENTS[self.dtype].itemsize


Group = Sequence[Stored]  # what one tensor of the model becomes


@dataclass(frozen=True)
class Shard:
    """One file.

    Args:
        name: the name of the file.
        groups: the tensors in it.
        header: the bytes at its beginning.
        offsets: where each tensor begins in the file, by its name.
    """

    name: str
    groups: Sequence[Group]
    header: bytes
    offsets: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self.header) + sum(tensor.nbytes for group in self.groups for tensor in group)


def shards(
    groups: Sequence[Group], metadata: Mapping[str, str], max_shard_size: int = MAX_SHARD_SIZE
) -> tuple[Shard, ...]:
    """The files that hold these tensors, each group in one of them.

    Args:
        groups: all tensors, in the order in which they will be written.
        metadata: free text at the beginning of each file.
        max_shard_size: the most bytes of tensors in a file; a group that has more is in one of its own.
    """
    divided: list[list[Group]] = [[]]
    filled = 0
    for group in groups:
        nbytes = sum(tensor.nbytes for tensor in group)
        if divided[-1] and filled + nbytes > max_shard_size:
            divided.append([])
            filled = 0
        divided[-1].append(group)
        filled += nbytes
    count = len(divided)
    names = [_SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return tuple(_shard(name, part, metadata) for name, part in zip(names, divided, strict=True))


def _shard(name: str, groups: Sequence[Group], metadata: Mapping[str, str]) -> Shard:
    # The widest elements first, so that all are aligned: there are no gaps in this format.
    ordered = sorted((tensor for group in groups for tensor in group), key=lambda t: -ELEMENTS[t.dtype].itemsize)
    begins: dict[str, int] = {}
    entries = {}
    end = 0
    for tensor in ordered:
        begins[tensor.name] = end
        end += tensor.nbytes
        kind = TYPES[tensor.dtype].safetensors
        entries[tensor.name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [begins[tensor.name], end],
        }
    header = encoded_header(metadata, entries, _ALIGNMENT)
    return Shard(name, groups, header, {tensor: len(header) + begin for tensor, begin in begins.items()})


def index_of(files: Sequence[Shard]) -> bytes:
    """The index of several files; empty for one, which needs none."""
    if len(files) == 1:
        return b""
    placed = {tensor.name: shard.name for shard in files for group in shard.groups for tensor in group}
    total = sum(tensor.nbytes for shard in files for group in shard.groups for tensor in group)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    return json.dumps(content, indent=2).encode()


def nbytes_of(files: Sequence[Shard]) -> int:
    """The exact size of the files and their index."""
    return sum(shard.nbytes for shard in files) + len(index_of(files))


def write_shards(folder: Path, files: Sequence[Shard], numbers: Iterator[Sequence[Array]]) -> list[Path]:
    """Write files and their index.

    Args:
        folder: where to.
        files: what is in each.
        numbers: the arrays of each group, in order; the next is asked for when the last is written.
    """
    written = []
    for shard in files:
        write_atomic(folder / shard.name, partial(_write, shard=shard, numbers=numbers))
        written.append(folder / shard.name)
    index = index_of(files)
    if index:
        write_atomic(folder / _INDEX, lambda file: file.write(index))
        written.append(folder / _INDEX)
    return written


def _write(file: BinaryIO, shard: Shard, numbers: Iterator[Sequence[Array]]) -> None:
    file.write(shard.header)
    for group in shard.groups:
        for tensor, array in zip(group, next(numbers), strict=True):
            assert (array.shape, array.dtype) == (tensor.shape, ELEMENTS[tensor.dtype]), tensor.name
            file.seek(shard.offsets[tensor.name])
            file.write(bytes_of(array))
