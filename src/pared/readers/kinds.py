"""Which reader a file has: by what it begins with, not by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from pared import container
from pared.container import File
from pared.readers.listing import Listing, unknown
from pared.readers.safetensors import read_safetensors
from pared.readers.torch_zip import read_torch_zip


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        begins: tells from the file's first bytes whether it is of this kind.
        read: gives its listing.
    """

    begins: Callable[[File], bool]
    read: Callable[[File], Listing]


# Asked in this order; the first that knows the file reads it.
KINDS: Final = (
    Kind(container.is_safetensors, read_safetensors),
    Kind(container.is_zip, lambda file: read_torch_zip(file, container.read_archive(file))),
)


def list_tensors(file: File) -> Listing:
    """The tensors of a file.

    Raises:
        FileError: it is of a kind that cannot be listed.
        CorruptError: it contradicts itself.
        UnsafeError: it cannot be understood without running code, or would take memory without bound.
    """
    for kind in KINDS:
        if kind.begins(file):
            listing = kind.read(file)
            return replace(
                listing,
                where=file.where,
                nbytes=listing.nbytes or len(file.data),
                kind=listing.kind or container.kind_of(file),
            )
    raise unknown(file, container.kind_of(file))
