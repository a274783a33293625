"""What `torch.save` and `torch.jit.save` write: a zip archive with a pickle and one member for each storage.

Nothing in a file is executed. The sizes that shapes and types imply are compared with those in the file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from pared.files.disk import File
from pared.files.memory_limit import MemoryLimit
from pared.files.pickles import Node, read_pickle
from pared.files.zip_file import PICKLE, Archive, Member, checked_content
from pared.readers.listing import ListedTensor, Listing, Note, Storage, Stretch, unknown
from pared.readers.torch.names import BIG_ENDIAN, HARMLESS
from pared.readers.torch.pickled import tensors_of
from pared.readers.torch.states import plain_of, states_of

_CONSTANTS: Final = "constants.pkl"
_CODE: Final = "code/"  # of TorchScript; a member with debug information follows each file
_DEBUG: Final = ".debug_pkl"
_DATA: Final = "data/"
_KEY_NBYTES: Final = 220  # of a place in two dictionaries, beside its name
_STORAGE_NBYTES: Final = 280
_EXTRA: Final = "extra/"  # files that the author of a TorchScript archive added
_BYTE_ORDER: Final = "byteorder"
_SCRIPTED: Final = "__torch__."  # the classes of TorchScript, whose code is in the archive and is never run here


def read_torch_zip(file: File, archive: Archive, folder: str) -> Listing:
    """List the tensors that `torch.save` or `torch.jit.save` wrote to this top folder of a zip archive.

    Raises:
        FileError: it was written on a big-endian machine.
        CorruptError: it contradicts itself.
        UnsafeError: its pickle cannot be interpreted, or would exceed the memory limit.
    """
    data, constant = f"{folder}{_DATA}", f"{folder}constants/"
    # All but the storages, of which there may be very many.
    members = {one.name.removeprefix(folder): one for one in archive.members if not one.name.startswith(data)}
    order = members.get(_BYTE_ORDER)
    if order is not None and bytes(_content(file, order)[:3]) == b"big":
        raise unknown(file, BIG_ENDIAN)
    memory = file.memory
    listing = _described(file, members[PICKLE], _stored(archive, data), memory)
    listing = replace(listing, notes={**listing.notes, **_foreign(members)})
    if _CONSTANTS not in members:
        return replace(listing, kind="a torch file")
    constants = _described(file, members[_CONSTANTS], _stored(archive, constant), memory)
    return Listing(
        tensors=(*listing.tensors, *(_constant(held) for held in constants.tensors)),
        storages={**listing.storages, **{f"constants/{key}": storage for key, storage in constants.storages.items()}},
        notes={**listing.notes, **_code(members), "(constants)": Note(members[_CONSTANTS].stored)},
        imports=tuple(name for name in (*listing.imports, *constants.imports) if not name.startswith(_SCRIPTED)),
        kind="a TorchScript archive",
    )


def _stored(archive: Archive, folder: str) -> dict[str, Member]:
    """The storages in a folder of the archive."""
    return {one.name.removeprefix(folder): one for one in archive.members if one.plain and one.name.startswith(folder)}


def _described(file: File, pickle: Member, stored: Mapping[str, Member], memory: MemoryLimit) -> Listing:
    """List what one pickle of the archive describes, with its storages."""
    memory.take(sum(_KEY_NBYTES + sys.getsizeof(key) for key in stored))
    sizes = {key: member.nbytes for key, member in stored.items()}
    left = memory.left
    found = read_pickle(checked_content(file, pickle), HARMLESS, file.where, memory)
    taken, imports = left - memory.left, found.imports
    tensors = tuple(tensors_of(found.root, sizes, file.where, memory))
    states = states_of(found.root, sizes, file.where, memory)
    plain = plain_of(found.root, [*states, *(held.name for held in tensors)])
    world = _world(found.root)
    del found  # storages take its place
    memory.give(taken)
    memory.take(_STORAGE_NBYTES * len(stored))
    storages = {key: Storage(one.stored, Stretch(file.data, one.offset, one.end)) for key, one in stored.items()}
    notes = {"(pickle)": Note(pickle.stored)}
    return Listing(tensors, storages, notes, imports, world=world, states=states, plain=plain)


def _world(root: object) -> int | None:
    """The number of processes over which DeepSpeed divided each tensor of the model."""
    sizes = [value for key, value in root.pairs if key == "mp_world_size"] if isinstance(root, Node) else []
    return sizes[0] if sizes and isinstance(sizes[0], int) else None


def _foreign(members: Mapping[str, Member]) -> dict[str, Note]:
    """The members that torch did not write: another model, for example, in a folder of its own."""
    known = (PICKLE, _CONSTANTS, _BYTE_ORDER, "version", "model.json", "bytecode.pkl")
    places = (_DATA, "constants/", _CODE, _EXTRA, ".")
    foreign = {name: m.stored for name, m in members.items() if name not in known and not name.startswith(places)}
    nbytes = sum(foreign.values())
    because = (
        f"in members of its archive that torch does not write, such as {next(iter(foreign))[:80]!r}" if nbytes else ""
    )
    return {"(other members)": Note(nbytes, because, stray=True)} if nbytes else {}


def _content(file: File, member: Member) -> memoryview:
    return file.data[member.offset : member.end]


def _constant(held: ListedTensor) -> ListedTensor:
    storage = None if held.storage is None else f"constants/{held.storage}"
    return replace(held, name=f"constants/{held.name}", storage=storage)


def _code(members: Mapping[str, Member]) -> dict[str, Note]:
    code = [member for name, member in members.items() if name.startswith(_CODE)]
    debug = sum(member.stored for member in code if member.name.endswith(_DEBUG))
    return {
        "(code)": Note(sum(member.stored for member in code) - debug),
        "(extra)": Note(
            sum(member.stored for name, member in members.items() if name.startswith(_EXTRA)),
            "files that were saved with it: the model does not need them",
            ballast=True,
        ),
        "(debug)": Note(debug, "the source lines of its instructions: the model does not need them", ballast=True),
    }
