"""Folders of weights, as Hugging Face, Intel Neural Compressor and others write them, as one listing.

Every file of the folder is accounted for: files of weights by their tensors, all others as a note.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Final

from pared.errors import FileError
from pared.files.checks import Place
from pared.files.disk import open_file, reading
from pared.files.memory_limit import MemoryLimit
from pared.readers.kinds import list_tensors
from pared.readers.listing import Listing, Note

# The suffixes of files of weights; any other file in a folder is a note, whatever it contains.
SUFFIXES: Final = frozenset(
    (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pt2", ".onnx", ".gguf", ".npz", ".npy", ".h5", ".keras")
)
_INDEX: Final = ".index.json"
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}\.[a-z]+$")
# The main file, whose tensors have no prefix: the first of these that is there. The tensors of all others have one.
_MAIN: Final = ("model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors",
                "pytorch_model.bin", "adapter_model.bin", "best_model.pt")  # fmt: skip
_INC: Final = ("best_configure.yaml", "best_configure.json", "qconfig.json", "quantize_config.json")
_MOST_FILES: Final = 10_000
_NBYTES_PER_BYTE: Final = 16  # an upper bound on Python's objects for each byte of an index


def list_folder(folder: Path, files: ExitStack) -> Listing:
    """List all tensors of a folder. Storage keys and notes begin with the name of their file.

    Tensors keep their names if they are in the folder's only file of weights, in the shards that an index lists or in
    files named like shards; in all other files, the file's path precedes their names.

    Args:
        folder: the directory.
        files: the stack on which the opened files are put; it closes them.

    Raises:
        FileError: no file of the folder holds weights, or one of them cannot be read.
        CorruptError: a file contradicts itself, or the index lists something that is missing.
    """
    sizes = _sizes(folder)
    indexes = (name for name in sizes if name.endswith(_INDEX) and "/" not in name)
    index = min(indexes, key=len, default=None)  # variants have longer names: model.fp16.safetensors.index.json
    placed = {} if index is None else _index(folder / index, sizes)
    named = [name for name in sizes if PurePosixPath(name).suffix in SUFFIXES or name in placed.values()]
    listings, unread = _listings(folder, named, set(placed.values()), files)
    if not listings:
        why = "".join(f" that pared reads ({name} {reason})" for name, reason in list(unread.items())[:1])
        raise FileError(
            f"holds no file of weights{why}",
            where=str(folder),
            remedy="Pass the directory that save wrote, a Hugging Face folder, or the path of a file.",
        )
    plain = _plain(listings, placed)
    _check_index(placed, listings, folder)
    parts = [_of_file(name, listing, name in plain) for name, listing in listings.items()]
    taken = {*listings, *_beside(listings)}
    others = {
        f"({name})": Note(size, unread.get(name, ""), file=True) for name, size in sizes.items() if name not in taken
    }
    return Listing(
        tensors=tuple(held for part in parts for held in part.tensors),
        storages={key: storage for part in parts for key, storage in part.storages.items()},
        notes={name: note for part in parts for name, note in part.notes.items()} | others,
        imports=tuple(sorted({name for part in parts for name in part.imports})),
        where=str(folder),
        nbytes=sum(sizes.values()),
        kind=_kind(sizes, index),
        flat=plain == listings.keys() and all(listing.flat for listing in listings.values()),
    )


def _listings(
    folder: Path, names: Iterable[str], wanted: Container[str], files: ExitStack
) -> tuple[dict[str, Listing], dict[str, str]]:
    """The listing of each readable file, and the reasons why others are not readable; `wanted` ones must be."""
    listings: dict[str, Listing] = {}
    unread: dict[str, str] = {}
    # ONNX models first: some of the others may be their data.
    for name in sorted(names, key=lambda name: (not name.endswith(".onnx"), name)):
        if name in _beside(listings):
            continue
        try:
            listings[name] = list_tensors(files.enter_context(open_file(folder / name)))
        except FileError as error:
            if type(error) is not FileError or name in wanted:
                raise
            unread[name] = error.what
    return dict(sorted(listings.items())), unread


def _beside(listings: Mapping[str, Listing]) -> set[str]:
    """The files that hold numbers of tensors in other files."""
    return {
        (PurePosixPath(name).parent / other).as_posix() for name, found in listings.items() for other in found.beside
    }


def _sizes(folder: Path) -> dict[str, int]:
    """The size of every regular file, by relative path, sorted."""
    found: dict[str, int] = {}
    for path in _files(folder):
        if len(found) == _MOST_FILES:
            raise FileError(
                f"holds more than {_MOST_FILES:,} files", where=str(folder), remedy="Pass the folder of one model."
            )
        with reading(path):
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return dict(sorted(found.items()))


def _files(folder: Path) -> Iterator[Path]:
    """All files. Links to files are followed, since Hugging Face's cache uses them; links to directories are not."""
    for directory, _, names in os.walk(folder):
        with reading(Path(directory)):
            found = [path for name in names if (path := Path(directory) / name).is_file()]
        yield from found


def _index(path: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """The file of each tensor, from an index."""
    at = Place(str(path))
    with open_file(path) as file:
        MemoryLimit(str(path), sum(sizes.values())).take(_NBYTES_PER_BYTE * len(file.data))
        top = at.mapping(at.json(bytes(file.data), "it"), "it")
    placed = at.mapping(top.get("weight_map"), "its 'weight_map'")
    for tensor, name in placed.items():
        if at.text(name, f"the file of {tensor[:80]!r}") not in sizes:
            at.fail(f"it says that {tensor[:80]!r} is in {name[:80]!r}, and the folder has no such file")
    return placed


def _check_index(placed: Mapping[str, str], listings: Mapping[str, Listing], folder: Path) -> None:
    held = {name: {tensor.name for tensor in listings[name].tensors} for name in set(placed.values())}
    for tensor, name in placed.items():
        if tensor not in held[name]:
            Place(str(folder)).fail(f"its index says that {tensor[:80]!r} is in {name[:80]!r}, and it is not")


def _plain(listings: Mapping[str, Listing], placed: Mapping[str, str]) -> set[str]:
    """The files whose tensors have no prefix."""
    if placed:
        return set(placed.values())
    if len(listings) == 1:
        return set(listings)
    main = next((name for name in _MAIN if name in listings), None)
    return {main} if main is not None else _shards(listings)


def _shards(names: Iterable[str]) -> set[str]:
    found = {name for name in names if _SHARD.search(name)}
    # Two sets of shards would have the same names.
    return found if len({_SHARD.sub("", name) for name in found}) == 1 else set()


def _of_file(name: str, listing: Listing, plain: bool) -> Listing:
    return replace(
        listing,
        tensors=tuple(
            replace(
                held,
                name=held.name if plain else f"{name}/{held.name}",
                storage=None if held.storage is None else f"{name}/{held.storage}",
            )
            for held in listing.tensors
        ),
        storages={f"{name}/{key}": storage for key, storage in listing.storages.items()},
        notes={f"({name}: {key.strip('()')})": note for key, note in listing.notes.items()},
    )


def _kind(sizes: Mapping[str, int], index: str | None) -> str:
    if any(name in sizes for name in _INC):
        return "a folder of Intel Neural Compressor"
    return "a Hugging Face folder" if index is not None or "config.json" in sizes else "a folder"
