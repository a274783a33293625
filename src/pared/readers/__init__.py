"""What is inside files of other kinds, found without running anything in them and without torch."""

from __future__ import annotations

from pared import container
from pared.container import File
from pared.readers.listing import ELEMENTS, FLOATING, Array, Held, Listing, Note, Storage, as_floats, unknown
from pared.readers.safetensors import read_safetensors
from pared.readers.torch_zip import read_torch_zip

__all__ = ["ELEMENTS", "FLOATING", "Array", "Held", "Listing", "Note", "Storage", "as_floats", "list_tensors"]


def list_tensors(file: File) -> Listing:
    """The tensors of a file that is no artifact of ours.

    Raises:
        FileError: it is of a kind that cannot be listed.
        CorruptError: it contradicts itself.
        UnsafeError: loading it would run code.
    """
    if container.is_safetensors(file):
        return read_safetensors(file)
    if container.is_zip(file):
        return read_torch_zip(file, container.read_archive(file))
    raise unknown(file, container.kind_of(file))
