"""`.safetensors` files: a header that says everything, and the tensors behind it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from pared.files.disk import File
from pared.files.safetensors_file import read_header
from pared.readers.listing import Held, Listing, Note, Storage

_TYPES: Final[Mapping[str, str]] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32",
    "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def read_safetensors(file: File) -> Listing:
    """The tensors of a `.safetensors` file, from its header.

    Raises:
        CorruptError: the header contradicts itself, or the size of the file.
    """
    header = read_header(file)
    tensors = tuple(
        Held(span.name, _TYPES.get(span.dtype, span.dtype), span.shape, span.end - span.begin, span.name)
        for span in header.spans
    )
    storages = {
        span.name: Storage(span.end - span.begin, partial(_content, file, span.begin, span.end))
        for span in header.spans
    }
    return Listing(tensors, storages, {"(header)": Note(header.nbytes)}, flat=True)


def _content(file: File, begin: int, end: int) -> memoryview:
    return file.data[begin:end]
