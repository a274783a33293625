"""The kind of a file, by its first bytes."""

from __future__ import annotations

from typing import Final

from pared.files.disk import File
from pared.files.safetensors_file import is_safetensors
from pared.files.zip_file import is_zip

POINTER: Final = b"version https://git-lfs"
# What a file begins with, and what it is then.
_KINDS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"PK\x03\x04", "a zip archive"),
    (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        "a torch file as written before version 1.6",
    ),
    (b"\x80", "a plain pickle"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip file"),
    (POINTER, "a Git LFS pointer in the place of the file"),
    (b"<", "a web page or an XML file"),
    (b"\x08", "an ONNX model or another protocol buffer"),
)


def kind_of(file: File) -> str:
    """The kind of a file, for messages: "a torch file"."""
    if is_safetensors(file):
        return "a .safetensors file"
    head = bytes(file.data[:128])
    if is_zip(file) and b"/data.pkl" in head:
        return "a torch file"
    if bytes(file.data[257:262]) == b"ustar":
        return "a tar archive, as torch wrote before version 0.1.10"
    return next((kind for magic, kind in _KINDS if head.startswith(magic)), "of an unknown kind")
