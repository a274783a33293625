"""`.safetensors` files: a header that describes the tensors, followed by their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from pared.files.disk import File
from pared.files.safetensors_file import read_header
from pared.formats.dtypes import TYPES
from pared.readers.listing import ListedTensor, Listing, Note, Storage

# The names in a file of the types that torch has too.
_NAMES: Final[Mapping[str, str]] = {kind.safetensors: name for name, kind in TYPES.items() if kind.safetensors}


def read_safetensors(file: File) -> Listing:
    """List the tensors of a `.safetensors` file from its header.

    Raises:
        CorruptError: the header contradicts itself, or the size of the file.
    """
    header = read_header(file)
    tensors = tuple(
        ListedTensor(span.name, _NAMES.get(span.dtype, span.dtype), span.shape, span.end - span.begin, span.name)
        for span in header.spans
    )
    storages = {
        span.name: Storage(span.end - span.begin, partial(_content, file, span.begin, span.end))
        for span in header.spans
    }
    return Listing(tensors, storages, {"(header)": Note(header.nbytes)}, flat=True)


def _content(file: File, begin: int, end: int) -> memoryview:
    return file.data[begin:end]
