"""What `torch.save` wrote before torch 1.6: five consecutive pickles, then the storages."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from typing import Final

from pared.files.checks import Place
from pared.files.disk import File
from pared.files.pickles import Node, Pickle, read_pickle
from pared.formats.dtypes import TYPES
from pared.readers.listing import Listing, Note, Storage, stray, unknown
from pared.readers.torch.names import BIG_ENDIAN, HARMLESS
from pared.readers.torch.pickled import storage_of, tensors_of
from pared.readers.torch.states import plain_of, states_of

_MAGIC: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickle of torch's magic number
_COUNT: Final = struct.Struct("<q")


def is_torch_legacy(file: File) -> bool:
    """Whether the file begins like one that torch wrote before 1.6."""
    return bytes(file.data[: len(_MAGIC)]) == _MAGIC


def read_torch_legacy(file: File) -> Listing:
    """List the tensors of a file that torch wrote before 1.6.

    Raises:
        FileError: it was written on a big-endian machine.
        CorruptError: it contradicts itself.
        UnsafeError: its pickle cannot be interpreted, or would exceed the memory limit.
    """
    at = Place(file.where)
    memory = file.memory
    position, pickles = len(_MAGIC), []
    for _ in ("version", "system", "content", "keys"):
        pickles.append(read_pickle(file.data[position:], HARMLESS, file.where, memory))
        position += pickles[-1].nbytes
    _, system, content, keys = pickles
    if isinstance(system.root, Node) and ("little_endian", False) in system.root.pairs:
        raise unknown(file, BIG_ENDIAN)
    storages = dict(_storages(file, position, keys.root, _kinds(content, at), at))
    end = position + sum(_COUNT.size + storage.nbytes for storage in storages.values())
    sizes = {key: storage.nbytes for key, storage in storages.items()}
    tensors = tuple(tensors_of(content.root, sizes, file.where, memory))
    states = states_of(content.root, sizes, file.where, memory)
    return Listing(
        tensors=tensors,
        storages=storages,
        notes={"(pickle)": Note(position), **stray(file.data, end, len(file.data), "after its last storage")},
        imports=content.imports,
        states=states,
        plain=plain_of(content.root, [*states, *(held.name for held in tensors)]),
        kind="a torch file of the kind that was written before torch 1.6",
    )


def _kinds(content: Pickle, at: Place) -> dict[str, str]:
    """The element type of each storage, which only references to it tell."""
    # The source code of a module's class, which whole modules were saved with, is not a storage.
    references = (r for r in content.references if list(r.fields[:1]) != ["module"])
    return {key: kind for key, kind, _ in (storage_of(r, at) for r in references)}


def _storages(
    file: File, position: int, keys: object, kinds: dict[str, str], at: Place
) -> Iterator[tuple[str, Storage]]:
    """The storages in the order of the keys: for each, a count and that number of elements."""
    for key in keys.values if isinstance(keys, Node) else at.fail("its list of storages is not a list"):
        if not isinstance(key, str) or key not in kinds:
            at.fail("it has a storage of unknown type")
        if position + _COUNT.size > len(file.data):
            at.fail(f"its storage {key[:80]!r} begins outside the file: it is truncated")
        (count,) = _COUNT.unpack_from(file.data, position)
        position += _COUNT.size
        nbytes = at.whole(count, f"the size of its storage {key[:80]!r}") * max(1, TYPES[kinds.pop(key)].bits // 8)
        if position + nbytes > len(file.data):
            at.fail(f"its storage {key[:80]!r} ends outside the file: it is truncated")
        yield key, Storage(nbytes, partial(_content, file, position, position + nbytes))
        position += nbytes


def _content(file: File, begin: int, end: int) -> memoryview:
    return file.data[begin:end]
