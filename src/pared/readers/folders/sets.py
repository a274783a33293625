"""Which files of a folder are one model, and whether all of them are there.

An index says it, or the numbers in the names ("model-00001-of-00003.safetensors"); a model of which a part is missing
is an error that names the part.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from pared.errors import CorruptError, FileError, UnsafeError
from pared.files.checks import Place
from pared.files.disk import open_file, reading
from pared.files.memory_limit import MemoryLimit
from pared.readers.folders.files import Found, find_files
from pared.readers.folders.names import (
    CHUNKS,
    DISTRIBUTED,
    INDEX,
    MAIN,
    SUFFIXES,
    folder_of,
    is_cut,
    is_index,
    is_rank_folder,
    is_read,
    is_training,
    numbered,
    of_folder,
    sibling,
)
from pared.readers.listing import Listing

_NBYTES_PER_BYTE: Final = 16  # an upper bound on Python's objects for each byte of an index
_SHOWN: Final = 3


@dataclass(frozen=True)
class WeightSet:
    """The files of one model.

    Args:
        files: their paths relative to the folder, sorted.
        placed: the file of each tensor, if an index says it.
    """

    files: tuple[str, ...]
    placed: Mapping[str, str]


def main_set(folder: Path, found: Found) -> WeightSet | None:
    """The files of the model that a folder is about; None if it holds several models, or none.

    They are those that libraries would open: `model.safetensors` before `pytorch_model.bin`, one file before shards.

    Raises:
        FileError: some of them are missing.
        CorruptError: its index contradicts itself, or the files.
    """
    names = [name for name in found.sizes if _is_candidate(name)]
    place = _main_folder(names)
    if place is None:
        return None
    inside = of_folder(names, place)
    everything = of_folder(found.sizes, place)
    for name in MAIN:
        one = _named(folder, found, place, name, inside, everything)
        if one is not None:
            return one
    if place + DISTRIBUTED in everything:
        return WeightSet((place + DISTRIBUTED,), {})
    for index in sorted((name for name in everything if is_index(name)), key=lambda name: (len(name), name)):
        one = _by_index(folder, index, found)
        if one is not None:
            return one
    families = {part.family for name in inside if (part := numbered(name)) is not None}
    if inside and len(families) == 1 and all(numbered(name) for name in inside):
        return _by_numbers(folder, inside[0], found.sizes)
    return WeightSet((inside[0],), {}) if len(inside) == 1 else None


def _is_candidate(name: str) -> bool:
    """Whether a file may be of the model: it is an index, or it is read, and training alone does not need it."""
    base = name.rpartition("/")[2]
    return (is_read(name) or is_index(name) or base == DISTRIBUTED) and not is_training(name)


def _main_folder(names: Collection[str]) -> str | None:
    """The folder with the model: the top folder, or the only one with weights."""
    places = {folder_of(name) for name in names}
    if "" in places:
        return ""
    return next(iter(places)) if len(places) == 1 else None


def _named(
    folder: Path, found: Found, place: str, name: str, inside: Collection[str], everything: Collection[str]
) -> WeightSet | None:
    """The set of a well-known name: the file, or else the files of its index, or else its shards."""
    if place + name in inside:
        return WeightSet((place + name,), {})
    if (odd := found.odd.get(place + name)) is not None:
        raise FileError(f"is {odd}", where=str(folder / place / name), remedy="Fetch the file that it stands for.")
    if f"{place}{name}{INDEX}" in everything:
        one = _by_index(folder, f"{place}{name}{INDEX}", found)
        if one is not None:
            return one
    stem, _, suffix = name.rpartition(".")
    for other in inside:
        part = numbered(other)
        if part is not None and (part.before, part.after) == (f"{place}{stem}-", f".{suffix}"):
            return _by_numbers(folder, other, found.sizes)
    return None


def set_of(path: Path) -> tuple[Path, WeightSet] | None:
    """The folder and the files of the model of which a file holds a part; None if it seems to hold all of it.

    Args:
        path: a shard, an index, or a file of a checkpoint of torch.distributed.checkpoint.

    Raises:
        FileError: some of the files are missing, or it is a piece of a file that was cut.
        CorruptError: the index contradicts itself, or the files.
    """
    folder, name = path.parent, path.name
    if name.endswith(CHUNKS) or name == DISTRIBUTED:
        return folder, WeightSet((DISTRIBUTED,), {})
    refuse_cut(path)
    if not path.is_file():
        return None
    found = find_files(folder, deep=False)
    for index in (one for one in found.sizes if is_index(one)):
        try:
            placed = index_of(folder / index, found.sizes)
        except (CorruptError, UnsafeError):
            if name == index or numbered(name):
                raise
            continue  # it may be about other files
        if name == index or name in placed.values():
            one = _by_index(folder, index, found)
            if one is not None and (name == index or len(one.files) > 1):
                return folder, one
    if is_rank_folder(folder.name) and (others := _ranks_beside(folder)) > 1:
        raise one_of_several(path, others, slices=True)
    one = _by_numbers(folder, name, {name: 0, **found.sizes})
    return (folder, one) if one is not None and len(one.files) > 1 else None


def _ranks_beside(folder: Path) -> int:
    with reading(folder.parent), os.scandir(folder.parent) as entries:
        return sum(entry.is_dir() and is_rank_folder(entry.name) for entry in entries)


def refuse_cut(path: Path) -> None:
    """Refuse a piece of a file that was cut, whose own bytes look like those of a damaged file.

    Raises:
        FileError: it is such a piece, by its name.
    """
    if path.suffix in SUFFIXES or not path.is_file():
        return
    with reading(path.parent), os.scandir(path.parent) as entries:
        beside = [entry.name for entry in entries]
    if whole := is_cut(path.name, beside):
        raise cut(path, whole)


def cut(path: Path, whole: str) -> FileError:
    """The error for a piece of a file that was cut.

    Args:
        path: the piece.
        whole: the name of the file that was cut.
    """
    return FileError(
        f"is a piece of {whole[:80]!r}, which was cut into several",
        where=str(path),
        remedy=f"Join the pieces in their order, and pass the file: cat {whole}* > {whole}",
    )


def index_of(path: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """The file of each tensor, relative to the top folder, from an index.

    Args:
        path: the index.
        sizes: the files of its folder, which bound the memory that it may take.

    Raises:
        CorruptError: it is not an index.
    """
    at = Place(str(path))
    with open_file(path) as file:
        MemoryLimit(str(path), sum(sizes.values()) + len(file.data)).take(_NBYTES_PER_BYTE * len(file.data))
        top = at.mapping(at.json(bytes(file.data), "it"), "it")
    placed = at.mapping(top.get("weight_map"), "its 'weight_map'")
    for tensor, name in placed.items():
        place = PurePosixPath(at.text(name, f"the file of {tensor[:80]!r}"))
        if place.is_absolute() or ".." in place.parts or "\0" in name or name == "":
            at.fail(f"it says that {tensor[:80]!r} is in {name[:80]!r}, which is not a file of its folder")
    return placed


def _by_index(folder: Path, index: str, found: Found) -> WeightSet | None:
    """The files that an index names, and those that by their names belong to them; None if none of them is there."""
    place = folder_of(index)
    placed = {tensor: place + name for tensor, name in index_of(folder / index, found.sizes).items()}
    files = set(placed.values())
    if not any(name in found.sizes or name in found.odd for name in files) and not _alone(index, found):
        return None
    for tensor, name in placed.items():
        if name not in found.sizes:
            missing = sorted(files - found.sizes.keys())
            more = f" (of its {len(files)} files, {len(missing)} are missing)" if len(missing) > 1 else ""
            raise CorruptError(
                f"it says that {tensor[:80]!r} is in {name[:80]!r}, and the folder has no such file{more}",
                where=str(folder / index),
                remedy=f"Fetch {_some(missing)}, and put it beside the others.",
            )
    ordered = sorted(files, reverse=True)  # so that the first of each family counts
    families = {
        part.family: name for name in ordered if (part := numbered(name)) is not None and part.count is not None
    }
    for name in families.values():
        alike = _by_numbers(folder, name, found.sizes)
        files.update(alike.files if alike is not None else ())
    return WeightSet(tuple(sorted(files)), placed)


def _alone(index: str, found: Found) -> bool:
    """Whether an index stands in a folder without any weights, so that it tells what is missing."""
    return not any(is_read(name) and not is_training(name) for name in of_folder(found.sizes, folder_of(index)))


def _by_numbers(folder: Path, name: str, sizes: Mapping[str, int]) -> WeightSet | None:
    """The files that are numbered like this one; None if the number means something else."""
    part = numbered(name)
    if part is None:
        return None
    present = {one.number: other for other in sizes if (one := numbered(other)) and one.family == part.family}
    if part.rank and len(present) == 1:
        return WeightSet((name,), {})  # of the one process that saves
    if part.rank and 0 not in present:
        return None
    if part.count is None or "world_size" in part.before:
        raise one_of_several(folder / name, part.count or len(present), slices=part.rank or part.count is not None)
    first = 0 if 0 in present else 1
    missing = [sibling(name, number) for number in range(first, first + part.count) if number not in present]
    if missing:
        raise FileError(
            f"is one of the {part.count} files of a model, and {_some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing",
            where=str(folder / name),
            remedy="Put all of them into one folder, under the names that they had.",
        )
    return WeightSet(tuple(sorted(present.values())), {})


def one_of_several(path: Path, count: int, *, slices: bool) -> FileError:
    """The error for a file whose siblings cannot be found or joined."""
    several = f"is one of {count} files of a model" if count > 1 else "is one of several files of a model"
    why = "each of which may hold a slice of every tensor" if slices else "and there is no index that names them all"
    return FileError(
        f"{several}, {why}",
        where=str(path),
        remedy="Load all of them with the program that wrote them, save the whole state dict with torch.save or as "
        ".safetensors, and pass that file (DeepSpeed: zero_to_fp32.py; verl: python -m verl.model_merger).",
    )


def _some(names: Collection[str]) -> str:
    shown = list(names)[:_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def check_whole(listings: Mapping[str, Listing], placed: Mapping[str, str], where: str) -> None:
    """Compare what the files of a model say about its parts with each other, and with the index.

    Args:
        listings: the tensors of each file.
        placed: the file of each tensor, if an index says it.
        where: the folder or the file, for messages.

    Raises:
        CorruptError: the index names a tensor that is not there, or the files do not belong together.
        FileError: some of the files are missing.
    """
    held = {name: {tensor.name for tensor in listings[name].tensors} for name in set(placed.values())}
    for tensor, name in placed.items():
        if tensor not in held[name]:
            raise CorruptError(
                f"its index says that {tensor[:80]!r} is in {name[:80]!r}, and it is not",
                where=where,
                remedy="Fetch the index and that file again: they are of different versions.",
            )
    for listing in listings.values():
        if listing.world is not None and listing.world > len(listings):
            raise one_of_several(Path(where), listing.world, slices=True)
    splits = {name: listing.split for name, listing in listings.items() if listing.split is not None}
    count = max((split.count for split in splits.values()), default=0)
    if count <= 1:
        return
    numbers = sorted(split.number for split in splits.values())
    if len(listings) != count or numbers != list(range(count)):
        first, split = next(iter(splits.items()))
        raise FileError(
            f"is file {split.number + 1} of the {count} files of a model, of which {len(listings)} were found",
            where=f"{where}: {first}" if len(listings) > 1 else where,
            remedy="Put all of them into one folder, under the names that llama.cpp gives them: "
            f"NAME-00001-of-{count:05d}.gguf",
        )
    wanted = max(split.tensors or 0 for split in splits.values())
    there = sum(len(listing.tensors) for listing in listings.values())
    if wanted and there != wanted:
        raise CorruptError(
            f"its files say that the model has {wanted:,} tensors, and hold {there:,}",
            where=where,
            remedy="Fetch the files again: they do not belong together, or one is damaged.",
        )
