"""What `torch.export.save` writes (`.pt2`): raw weights in a zip archive, described by JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final

from pared.files.checks import Place
from pared.files.disk import File
from pared.files.memory_limit import MemoryLimit
from pared.files.zip_file import Archive, Member, checked_content
from pared.formats.dtypes import TYPES
from pared.readers.listing import ListedTensor, Listing, Note, Storage
from pared.readers.torch.pickled import view_of

_WEIGHTS: Final = "data/weights/"
_CONSTANTS: Final = "data/constants/"
_CONFIGS: Final = ("_weights_config.json", "_constants_config.json")
_MODELS: Final = "models/"
_SAMPLES: Final = "data/sample_inputs/"
_OBJECTS: Final = "tensor subclasses and objects, as pickles: not read"
_JSON_NBYTES: Final = 24  # an upper bound on Python's objects for each byte of JSON
_HELD_NBYTES: Final = 1000

# The number of each element type: torch/_export/serde/schema.py, ScalarType.
_TYPES: Final[Mapping[int, str]] = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu",
    34: "uint32", 35: "uint64",
}  # fmt: skip


def export_folder(archive: Archive) -> str | None:
    """The top folder of an archive that `torch.export.save` wrote, with a final slash; None for other archives."""
    for member in archive.members:
        folder, _, rest = member.name.partition("/")
        if rest == "archive_format":
            return f"{folder}/"
    return None


def read_torch_export(file: File, archive: Archive, folder: str) -> Listing:
    """List the weights and constants of the exported programs in a `.pt2` archive.

    If it holds several programs, the name of a program precedes the names of its tensors.

    Raises:
        CorruptError: it contradicts itself.
        UnsafeError: listing it would exceed the memory limit.
    """
    members = {member.name.removeprefix(folder): member for member in archive.members}
    memory = file.memory
    configs = [name for name in members if name.startswith((_WEIGHTS, _CONSTANTS)) and name.endswith(_CONFIGS)]
    programs = {_program(name) for name in configs}
    tensors: list[ListedTensor] = []
    pickled: set[str] = set()
    for name in configs:
        prefix = f"{_program(name)}/" if len(programs) > 1 else ""
        for tensor, path, entry in _entries(file, members, name, memory):
            # Tensor subclasses and custom objects are torch files or pickles within this archive.
            if entry.get("use_pickle"):
                pickled.add(path)
            else:
                at = Place(f"{file.where}: {tensor}")
                tensors.append(_held(prefix + tensor, entry.get("tensor_meta"), path, members, at))
    payloads = {
        name: member
        for name, member in members.items()
        if name.startswith((_WEIGHTS, _CONSTANTS)) and name not in {*configs, *pickled} and member.plain
    }
    return Listing(
        tensors=tuple(tensors),
        storages={name: Storage(member.stored, partial(_content, file, member)) for name, member in payloads.items()},
        notes={
            "(graph)": _note(members, _MODELS),
            "(objects)": Note(sum(members[path].stored for path in pickled if path in members), _OBJECTS),
            "(configuration)": Note(sum(members[name].stored for name in configs)),
            "(sample inputs)": _note(
                members, _SAMPLES, "the inputs it was exported with: the model does not need them"
            ),
        },
        kind="an exported program (.pt2)",
    )


def _program(config: str) -> str:
    name = config.rpartition("/")[2]
    return next(name.removesuffix(end) for end in _CONFIGS if name.endswith(end))


def _note(members: Mapping[str, Member], folder: str, because: str = "") -> Note:
    nbytes = sum(member.stored for name, member in members.items() if name.startswith(folder))
    return Note(nbytes, because, ballast=bool(because))


def _content(file: File, member: Member) -> memoryview:
    return file.data[member.offset : member.end]


def _entries(
    file: File, members: Mapping[str, Member], config: str, memory: MemoryLimit
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The tensors in a configuration: name, path in the archive, and description."""
    at = Place(f"{file.where}: {config}")
    memory.take(_JSON_NBYTES * members[config].stored)
    top = at.mapping(at.json(checked_content(file, members[config]), "it"), "it")
    folder = config.rpartition("/")[0]
    for name, value in at.mapping(top.get("config"), "its 'config'").items():
        memory.take(_HELD_NBYTES)
        entry = at.mapping(value, f"its entry {name[:80]!r}")
        path = at.text(entry.get("path_name"), f"the path of {at.text(name, 'the name of a tensor')[:80]!r}")
        yield name, f"{folder}/{path}", entry


def _held(name: str, meta: object, path: str, members: Mapping[str, Member], at: Place) -> ListedTensor:
    fields = at.mapping(meta, "its description")
    if path not in members or not members[path].plain:
        at.fail(f"its member {path[:80]!r} is missing")
    kind = _TYPES.get(at.whole(fields.get("dtype"), "its dtype"), "")
    if kind not in TYPES:
        at.fail("its dtype is unknown")
    shape = at.shape([_int(size, at) for size in at.sequence(fields.get("sizes"), "its sizes")], "sizes")
    stride = tuple(at.whole(_int(s, at), "a stride") for s in at.sequence(fields.get("strides"), "its strides"))
    offset = at.whole(_int(fields.get("storage_offset"), at), "its offset")
    return view_of(name, kind, shape, stride, offset, (path, members[path].nbytes), at)


def _int(value: object, at: Place) -> object:
    """The integer in a size, which may be an expression if the size was dynamic."""
    return at.mapping(value, "a size").get("as_int")
