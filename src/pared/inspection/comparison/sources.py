"""The tensors of a file, a folder, an artifact, a state dict or a model, ready to be compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Final

from pared.artifact.envelope import Records, open_records
from pared.artifact.listing import list_artifact, open_either
from pared.errors import ConfigError
from pared.files.disk import as_path
from pared.formats import grids
from pared.formats.dtypes import ELEMENTS, Array
from pared.formats.grids import CODE_LIMITS
from pared.formats.views import View
from pared.readers.listing import ListedTensor, Listing
from pared.readers.memory import is_model, is_state_dict, list_model, list_state_dict


@dataclass(frozen=True, eq=False)
class ReadableTensor(ListedTensor):
    """A listed tensor, with what it takes to compare its numbers.

    Args:
        read: returns the numbers; None if they cannot be read.
        note: what a reader of the comparison has to know about the numbers.
        by_columns: another reading, for a square matrix of codes: nothing says whether its steps belong to the rows,
            as `read` assumes, or to the columns, as here. None for all other tensors.
        pieces: the numbers in C order, piece by piece, where `read` would take too much memory and gives None.
    """

    read: Callable[[], Array | None] = lambda: None
    note: str = ""
    by_columns: Callable[[], Array | None] | None = None
    pieces: Callable[[], Iterator[Array]] | None = None


@contextmanager
def open_source(target: object, where: str) -> Iterator[Listing]:
    """List the tensors of a model in any form; their numbers can be read while the context is open.

    Args:
        target: a path, a `torch.nn.Module`, float or quantized, or a state dict.
        where: what the caller calls it, for messages.

    Raises:
        ConfigError: it is none of these.
        FileError: the file cannot be read, or its format is not supported.
        CorruptError, UnsafeError, VersionError: as `inspect`.
    """
    if isinstance(target, str | os.PathLike):
        with open_either(as_path(target, where)) as found:
            yield list_artifact(found) if isinstance(found, Records) else found
    elif hasattr(type(target), "_pared_artifact"):
        quantized: Any = target
        with open_records(quantized._pared_artifact(), type(target).__name__) as records:
            yield list_artifact(records)
    elif is_model(target):
        yield list_model(target)
    elif is_state_dict(target):
        yield list_state_dict(target)  # type: ignore[arg-type]  # just asked
    else:
        raise ConfigError(
            f"expected a path, a torch.nn.Module or a state dict, got {type(target).__name__}",
            where=where,
            remedy="Pass the path of a file or folder, a model, or model.state_dict().",
        )


def readable(listing: Listing, most: int) -> list[ReadableTensor]:
    """The tensors of a listing. The bytes of tied ones count once; codes and their steps become one tensor.

    Args:
        listing: the tensors.
        most: the bytes that reading one of them may take.
    """
    tensors = []
    seen: set[object] = set()
    for held in listing.tensors:
        nbytes = 0 if held.place in seen else held.nbytes
        seen |= {held.place} - {None}
        known = {one.name: getattr(held, one.name) for one in fields(held)} | {"nbytes": nbytes}
        storage = listing.storages.get(held.storage or "")
        if storage is not None and storage.need > most:
            tensors.append(ReadableTensor(**known, note=_note(held), pieces=storage.pieces))
        else:
            tensors.append(ReadableTensor(**known, read=partial(listing.array, held), note=_note(held)))
    return list(_joined(tensors))


# Types of codes whose scales are stored elsewhere in a file.
_SCALED: Final = ("qint8", "quint8", "qint32")


def _note(held: ListedTensor) -> str:
    if held.storage is None:
        return "on the meta device: it holds no numbers"
    if held.dtype in _SCALED:
        return "codes, whose scales are not read: they compare with codes only"
    return "" if held.dtype in ELEMENTS else f"{held.dtype}: numbers in blocks, which are not read"


# In the state dict of a quantized model, codes have the name of their tensor, and steps that name with this suffix.
_STEP: Final = "_step"


def _joined(tensors: Sequence[ReadableTensor]) -> Iterator[ReadableTensor]:
    """Join codes and their steps, as they stand in the state dict of a quantized model."""
    by_name = {tensor.name: tensor for tensor in tensors}
    steps = {
        tensor.name: step
        for tensor in tensors
        if tensor.dtype in CODE_LIMITS and (step := by_name.get(f"{tensor.name}{_STEP}")) and step.dtype == "float32"
    }
    taken = {step.name for step in steps.values()}
    for tensor in tensors:
        if tensor.name in steps:
            yield _on_grid(tensor, steps[tensor.name])
        elif tensor.name not in taken:
            yield tensor


def _on_grid(codes: ReadableTensor, step: ReadableTensor) -> ReadableTensor:
    joined = replace(codes, nbytes=codes.nbytes + step.nbytes)
    rows = [i for i, n in enumerate(codes.shape) if step.shape == (n,)]
    if step.shape and not rows:
        note = "codes, whose steps do not say which rows they belong to: they compare with codes only"
        return replace(joined, note=note)
    views = [View(codes.shape, (row,)) for row in rows] or [View(codes.shape, ())]
    read, *others = (partial(_decoded, codes, step, view) for view in views)
    format = f"grid {codes.dtype}"
    return replace(joined, dtype="float32", format=format, read=read, by_columns=others[0] if others else None)


def _decoded(codes: ReadableTensor, step: ReadableTensor, view: View) -> Array | None:
    numbers, steps = codes.read(), step.read()
    return None if numbers is None or steps is None else grids.decode(numbers, steps, view)
