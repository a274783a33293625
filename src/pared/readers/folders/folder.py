"""Folders of weights, as Hugging Face, Intel Neural Compressor and others write them, as one listing.

Every file of the folder is accounted for: files of weights by their tensors, all others as a note.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Final

from pared.errors import FileError
from pared.files.disk import open_file
from pared.readers.folders.distributed import list_checkpoint
from pared.readers.folders.files import Found, find_files
from pared.readers.folders.hub import places_of, snapshot_of
from pared.readers.folders.manifests import files_of, model_parts
from pared.readers.folders.names import CHUNKS, DISTRIBUTED, is_cut, is_index, is_read, is_training
from pared.readers.folders.parallel import check_parallel
from pared.readers.folders.sets import WeightSet, check_whole, cut, main_set, set_of
from pared.readers.kinds import list_tensors
from pared.readers.listing import ListedTensor, Listing, Note

_INC: Final = ("best_configure.yaml", "best_configure.json", "qconfig.json", "quantize_config.json")
_ADAPTER: Final = "adapter_config.json"
_FOR_TRAINING: Final = "only training needs it"


def list_folder(folder: Path, files: ExitStack) -> Listing:
    """List all tensors of a folder. Storage keys and notes begin with the name of their file.

    Tensors keep their names if they are in the files of the folder's model (`main_set`); in all other files, the
    file's path precedes their names.

    Args:
        folder: the directory; of a folder of Hugging Face's cache, its snapshot is listed.
        files: the stack on which the opened files are put; it closes them.

    Raises:
        FileError: no file of the folder holds weights, or one of them is missing or cannot be read.
        CorruptError: a file contradicts itself, or the index lists something that is missing.
    """
    folder = snapshot_of(folder)
    found = find_files(folder)
    mains = list(_mains(folder, found))
    wanted = [name for _, main in mains for name in main.files]
    named = [name for name in found.sizes if is_read(name) or _is_distributed(name, found.sizes) or name in wanted]
    # Of a folder of one file, the error tells about the folder.
    listings, unread = _listings(folder, named, wanted if len(named) > 1 else (), files)
    if not listings:
        raise _without_weights(folder, found.sizes, found.odd, unread)
    for _, main in mains:
        there = {name: listings[name] for name in main.files if name in listings}
        check_whole(there, main.placed, str(folder))
        for name, listing in there.items():
            check_parallel(folder / name, listing)
    prefixes = {name: prefix for prefix, main in mains for name in main.files if name in listings}
    prefixes = prefixes or (dict.fromkeys(listings, "") if len(listings) == 1 else {})
    parts = {name: _of_file(name, listing, prefixes.get(name, f"{name}/")) for name, listing in listings.items()}
    taken = {*listings, *_beside(listings)}
    others = {
        f"({name})": Note(size, unread.get(name, _FOR_TRAINING if is_training(name) else ""), file=True)
        for name, size in found.sizes.items()
        if name not in taken
    }
    return replace(
        _joined(parts, folder, [name for name in wanted if name in listings] if len(mains) == 1 else ()),
        notes={name: note for part in parts.values() for name, note in part.notes.items()} | others,
        nbytes=sum(found.sizes.values()),
        kind=_kind(found.sizes),
        flat=not any(prefixes.get(name, name) for name in listings) and all(one.flat for one in listings.values()),
    )


def _mains(folder: Path, found: Found) -> Iterator[tuple[str, WeightSet]]:
    """The models of a folder: one, or those of its parts, with what precedes the names of their tensors."""
    parts = model_parts(folder)
    for part in parts or ("",):
        main = main_set(folder / part, files_of(folder, part) if parts else found)
        inside = f"{part}/" if part else ""
        if main is not None:
            placed = {tensor: inside + name for tensor, name in main.placed.items()}
            yield inside, WeightSet(tuple(inside + name for name in main.files), placed)


def list_part(folder: Path, files: ExitStack) -> Listing:
    """List the tensors of the model that is directly in a folder, without those of other models in it.

    Raises:
        FileError, CorruptError, UnsafeError: as `list_folder`.
    """
    main = main_set(folder, find_files(folder, deep=False))
    return list_folder(folder, files) if main is None else _list_set(folder, main, folder, files)


def list_file(path: Path, files: ExitStack) -> Listing:
    """List the tensors of a file; of one file of several, the tensors of all of them.

    Args:
        path: the file; of a link, the neighbours are sought where it is, and where it leads.
        files: the stack on which the opened files are put; it closes them.

    Raises:
        FileError: it cannot be read, its format is not supported, or it is a part of a model that is not all there.
        CorruptError: it contradicts itself.
        UnsafeError: it cannot be read without running code or within the memory limit.
    """
    for place in places_of(path):
        several = set_of(place)
        if several is not None:
            return _list_set(*several, path, files)
    listing = list_tensors(files.enter_context(open_file(path)))
    check_whole({path.name: listing}, {}, str(path))
    check_parallel(path, listing)
    return listing


def _list_set(folder: Path, several: WeightSet, path: Path, files: ExitStack) -> Listing:
    """The tensors of the files of one model, without the rest of their folder."""
    listings, _ = _listings(folder, several.files, several.files, files)
    check_whole(listings, several.placed, str(path))
    parts = {name: _of_file(name, listing, "") for name, listing in listings.items()}
    kinds = {listing.kind for listing in listings.values()}
    of = f", one of {len(listings)} files" if len(listings) > 1 else ""
    return replace(
        _joined(parts, folder, listings),
        where=str(path),
        nbytes=sum(listing.nbytes for listing in listings.values()),
        kind=min(kinds) + of,
        flat=all(listing.flat for listing in listings.values()),
    )


def _listings(
    folder: Path, names: Iterable[str], wanted: Collection[str], files: ExitStack
) -> tuple[dict[str, Listing], dict[str, str]]:
    """The listing of each readable file, and the reasons why others are not readable; `wanted` ones must be."""
    listings: dict[str, Listing] = {}
    unread: dict[str, str] = {}
    beside: set[str] = set()
    # ONNX models first: some of the others may be their data.
    for name in sorted(names, key=lambda name: (not name.endswith(".onnx"), name)):
        if name in beside:
            continue
        try:
            if PurePosixPath(name).name == DISTRIBUTED:
                listings[name] = list_checkpoint((folder / name).parent)
            else:
                listings[name] = list_tensors(files.enter_context(open_file(folder / name)))
        except FileError as error:
            if type(error) is not FileError or name in wanted:
                raise
            unread[name] = error.what
            continue
        beside |= _beside({name: listings[name]})
    return dict(sorted(listings.items())), unread


def _is_distributed(name: str, sizes: Mapping[str, int]) -> bool:
    """Whether a file is the metadata of a distributed checkpoint: other programs have files of this name too."""
    folder, slash, base = name.rpartition("/")
    return base == DISTRIBUTED and any(other.startswith(folder + slash) and other.endswith(CHUNKS) for other in sizes)


def _beside(listings: Mapping[str, Listing]) -> set[str]:
    """The files that hold numbers of tensors in other files."""
    return {
        (PurePosixPath(name).parent / other).as_posix() for name, found in listings.items() for other in found.beside
    }


def _without_weights(
    folder: Path, sizes: Mapping[str, int], odd: Mapping[str, str], unread: Mapping[str, str]
) -> FileError:
    """The error for a folder without weights, which says what comes nearest to them."""
    if any(name.endswith(CHUNKS) for name in sizes):
        name = next(name for name in sizes if name.endswith(CHUNKS))
        list_checkpoint((folder / name).parent)  # which says what is missing
    if pieces := [name for name in sizes if is_cut(name, sizes)]:
        return cut(folder / pieces[0], is_cut(pieces[0], sizes))
    why, remedy = "", "Pass the directory that save wrote, a Hugging Face folder, or the path of a file."
    lost = {name: f"is {what}" for name, what in odd.items() if is_read(name)}
    for name, reason in [*unread.items(), *lost.items()]:
        why = f" that pared reads ({name} {reason})"
        break
    indexes = [name for name in sizes if is_index(name)]
    if "Git LFS" in why or lost:
        remedy = "Fetch the files that stand behind it: git lfs pull in a clone, or hf download ORG/NAME."
    elif indexes and not why:
        why, remedy = f", only {indexes[0]}", "Fetch the files that the index names, and put them beside it."
    return FileError(f"holds no file of weights{why}", where=str(folder), remedy=remedy)


def _joined(named: Mapping[str, Listing], folder: Path, main: Collection[str]) -> Listing:
    """The tensors of several files as one listing."""
    parts = list(named.values())
    model = [named[name] for name in main] or parts
    said = [set(part.metadata.items()) for part in model]
    return Listing(
        tensors=tuple(held for part in parts for held in part.tensors),
        storages={key: storage for part in parts for key, storage in part.storages.items()},
        notes={name: note for part in parts for name, note in part.notes.items()},
        imports=tuple(sorted({name for part in parts for name in part.imports})),
        where=str(folder),
        files={name: folder / name for name in sorted(main)},
        states={name: state for part in parts for name, state in part.states.items()},
        metadata=dict(sorted(set.intersection(*said))) if said else {},
        plain=tuple(dict.fromkeys(name for part in model for name in part.plain)),
    )


def _of_file(name: str, listing: Listing, prefix: str) -> Listing:
    def here(held: ListedTensor) -> ListedTensor:
        storage = None if held.storage is None else f"{name}/{held.storage}"
        return replace(held, name=f"{prefix}{held.name}", storage=storage)

    return replace(
        listing,
        tensors=tuple(map(here, listing.tensors)),
        states={
            f"{prefix}{key}": replace(
                state, parts=tuple(here(part) if isinstance(part, ListedTensor) else part for part in state.parts)
            )
            for key, state in listing.states.items()
        },
        storages={f"{name}/{key}": storage for key, storage in listing.storages.items()},
        notes={f"({name}: {key.strip('()')})": note for key, note in listing.notes.items()},
    )


def _kind(sizes: Mapping[str, int]) -> str:
    if any(name in sizes for name in _INC):
        return "a folder of Intel Neural Compressor"
    if _ADAPTER in sizes and "config.json" not in sizes:
        return "a folder with an adapter of PEFT, which needs the model it was trained for"
    known = "config.json" in sizes or any(is_index(name) and "/" not in name for name in sizes)
    return "a Hugging Face folder" if known else "a folder"
