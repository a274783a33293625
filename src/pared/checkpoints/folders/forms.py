"""One model in several forms in one folder: which of its files must agree with those that are taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import numpy as np

from pared.checkpoints.selection import file_of
from pared.errors import FileError
from pared.formats.dtypes import FLOATING
from pared.readers.folders.names import folder_of
from pared.readers.listing import ListedTensor, Listing

# The names under which libraries keep one model, by what follows "pytorch_" or nothing.
_FORM: Final = re.compile(
    r"(?:pytorch_)?(diffusion_pytorch_model|adapter_model|model)(?:[-.].*)?\.(?:bin|safetensors)$"
)
_REMEDY: Final = "Pass the path of the file that is right, or remove the other."


def check_forms(listing: Listing) -> None:
    """Compare the names and shapes of the model's tensors with those in its other forms: `.bin` beside `.safetensors`.

    Tied tensors, buffers and vectors may be in one form only, as libraries leave them out.

    Raises:
        FileError: another form has other shapes, or matrices that the model lacks.
    """
    role = {_role(name) for name in listing.files}
    if len(role) != 1 or None in role:
        return
    plain = {held.name: held for held in listing.tensors if file_of(held) is None}
    others: dict[str, dict[str, ListedTensor]] = {}
    for held in listing.tensors:
        name = file_of(held)
        if name is not None and _role(name) in role:
            others.setdefault(name, {})[held.name.removeprefix(f"{name}/")] = held
    taken = next(iter(listing.files))
    for name, form in others.items():
        for tensor, held in form.items():
            if tensor in plain and plain[tensor].shape != held.shape:
                raise FileError(
                    f"has the shape {list(held.shape)} in {name}, "
                    f"and {list(plain[tensor].shape)} in the file that is taken, {taken}",
                    where=f"{listing.where}: {tensor}",
                    remedy=_REMEDY,
                )
        lacking = [tensor for tensor, held in form.items() if _is_lost(listing, tensor, held, form, plain)]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise FileError(
                f"{name} has {lacking[0]}{more}, and the file that is taken, {taken}, has not",
                where=listing.where,
                remedy=_REMEDY,
            )


def _role(name: str) -> str | None:
    """What libraries would open a file as, and where; None for other files."""
    found = _FORM.match(name.rpartition("/")[2])
    return folder_of(name) + found[1] if found else None


def _is_lost(
    listing: Listing,
    name: str,
    held: ListedTensor,
    form: Mapping[str, ListedTensor],
    plain: Mapping[str, ListedTensor],
) -> bool:
    """Whether a matrix of another form is missing among the tensors that are taken, under any name."""
    if name in plain or held.dtype not in FLOATING or len(held.shape) < 2 or not plain or held.storage is None:
        return False
    if any(other.place == held.place and tensor in plain for tensor, other in form.items()):
        return False  # tied
    alike = (one for one in plain.values() if one.shape == held.shape and one.dtype == held.dtype)
    numbers = listing.array(held)
    return not any(
        numbers is not None
        and (found := listing.array(one)) is not None
        and np.array_equal(numbers[:1], found[:1])  # which tells most apart
        and np.array_equal(numbers, found)
        for one in alike
    )
