"""Which reader a file has: by what it begins with, not by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from pared.files.disk import File
from pared.files.magic import kind_of
from pared.files.safetensors_file import is_safetensors
from pared.files.zip_file import is_zip, read_archive, torch_folder
from pared.readers.gguf import is_gguf, read_gguf
from pared.readers.hdf5.datasets import is_hdf5, read_hdf5
from pared.readers.hdf5.keras import is_keras, read_keras
from pared.readers.listing import Listing, unknown
from pared.readers.numpy_files import is_npy, is_npz, read_npy, read_npz
from pared.readers.onnx.model import is_onnx, read_onnx
from pared.readers.safetensors import read_safetensors
from pared.readers.torch.archive import read_torch_zip
from pared.readers.torch.exported import export_folder, read_torch_export
from pared.readers.torch.legacy import is_torch_legacy, read_torch_legacy


def _read_zip(file: File) -> Listing:
    """What a zip archive holds, by the names of its members."""
    archive = read_archive(file)
    exported = export_folder(archive)
    if exported is not None:
        return read_torch_export(file, archive, exported)
    if is_npz(archive):
        return read_npz(file, archive)
    if is_keras(archive):
        return read_keras(file, archive)
    saved = torch_folder(file, archive)
    if saved is not None:
        return read_torch_zip(file, archive, saved)
    raise unknown(file, "a zip archive of a kind unknown here")


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
    Kind(is_safetensors, read_safetensors),
    Kind(is_zip, _read_zip),
    Kind(is_torch_legacy, read_torch_legacy),
    Kind(is_gguf, read_gguf),
    Kind(is_npy, read_npy),
    Kind(is_hdf5, read_hdf5),
    Kind(is_onnx, read_onnx),
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
                kind=listing.kind or kind_of(file),
            )
    raise unknown(file, kind_of(file))
