"""The reader for a file, chosen by its first bytes, not by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final, NoReturn

from pared.errors import FileError
from pared.files.disk import File
from pared.files.magic import POINTER, kind_of
from pared.files.safetensors_file import is_safetensors
from pared.files.zip_file import Archive, is_zip, read_archive, torch_folder
from pared.readers.gguf import is_gguf, read_gguf
from pared.readers.listing import Listing, Note, stray, unknown
from pared.readers.numpy_files import is_npy, is_npz, read_npy, read_npz
from pared.readers.onnx.model import is_onnx, read_onnx
from pared.readers.safetensors import read_safetensors
from pared.readers.torch.archive import read_torch_zip
from pared.readers.torch.exported import export_folder, read_torch_export
from pared.readers.torch.legacy import is_torch_legacy, read_torch_legacy


def _read_zip(file: File) -> Listing:
    """List a zip archive, whose kind the names of its members tell."""
    archive = read_archive(file)
    listing = _read_members(file, archive)
    between = sum(note.nbytes for gap in archive.gaps() for note in stray(file.data, *gap, "").values())
    gaps = {"(bytes between its members)": Note(between, "outside its members, and belong to no tensor", stray=True)}
    after = stray(file.data, archive.end, len(file.data), "after its end")
    return replace(listing, notes={**listing.notes, **(gaps if between else {}), **after})


def _read_members(file: File, archive: Archive) -> Listing:
    exported = export_folder(archive)
    if exported is not None:
        return read_torch_export(file, archive, exported)
    if is_npz(archive):
        return read_npz(file, archive)
    if any(member.name == "model.weights.h5" for member in archive.members):
        _refuse_keras(file, "a .keras file")
    saved = torch_folder(file, archive)
    if saved is not None:
        return read_torch_zip(file, archive, saved)
    raise unknown(file, "a zip archive of an unknown kind")


def _is_pointer(file: File) -> bool:
    return bytes(file.data[:128]).startswith(POINTER)


def _refuse_pointer(file: File) -> NoReturn:
    raise FileError(
        f"is {kind_of(file)}: its repository was cloned without large files",
        where=file.where,
        remedy="Run 'git lfs install' and 'git lfs pull' in the clone, or fetch the model with: hf download ORG/NAME",
    )


def _is_hdf5(file: File) -> bool:
    return bytes(file.data[:8]) == b"\x89HDF\r\n\x1a\n"


def _refuse_keras(file: File, kind: str) -> NoReturn:
    raise FileError(
        f"is {kind}; pared does not read the files of Keras",
        where=file.where,
        remedy="Load it with Keras, and save the weights by name with numpy.savez or safetensors: pared reads both.",
    )


# Whether a file's first bytes are those of a kind, and the reader of that kind; the first match reads the file.
_READERS: Final[tuple[tuple[Callable[[File], bool], Callable[[File], Listing]], ...]] = (
    (is_safetensors, read_safetensors),
    (is_zip, _read_zip),
    (_is_pointer, _refuse_pointer),
    (is_torch_legacy, read_torch_legacy),
    (is_gguf, read_gguf),
    (is_npy, read_npy),
    (_is_hdf5, partial(_refuse_keras, kind="an HDF5 file, as Keras writes them")),
    (is_onnx, read_onnx),
)


def list_tensors(file: File) -> Listing:
    """List the tensors of a file.

    Raises:
        FileError: its format is not supported.
        CorruptError: it contradicts itself.
        UnsafeError: it cannot be read without running code or within the memory limit.
    """
    for is_kind, read in _READERS:
        if is_kind(file):
            listing = read(file)
            return replace(
                listing,
                where=file.where,
                nbytes=listing.nbytes or len(file.data),
                kind=listing.kind or kind_of(file),
            )
    raise unknown(file, kind_of(file))
