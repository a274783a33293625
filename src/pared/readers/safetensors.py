"""`.safetensors` files: a header that describes the tensors, followed by their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pared.errors import FileError
from pared.files.checks import Place
from pared.files.disk import File
from pared.files.safetensors_file import Header, read_header
from pared.formats.dtypes import TYPES
from pared.readers.listing import ListedTensor, Listing, Note, Storage, Stretch

_TENSOR_NBYTES: Final = 400
_SLICES: Final = "DCP_SHARDING_INFO"  # a key of the metadata
# The names in a file of the types that torch has too.
_NAMES: Final[Mapping[str, str]] = {kind.safetensors: name for name, kind in TYPES.items() if kind.safetensors}


def read_safetensors(file: File) -> Listing:
    """List the tensors of a `.safetensors` file from its header.

    Raises:
        CorruptError: the header contradicts itself, or the size of the file.
    """
    header = read_header(file)
    _refuse_slices(header, file)
    file.memory.take(_TENSOR_NBYTES * len(header.spans))
    tensors = tuple(
        ListedTensor(span.name, _NAMES.get(span.dtype, span.dtype), span.shape, span.end - span.begin, span.name)
        for span in header.spans
    )
    storages = {
        span.name: Storage(span.end - span.begin, Stretch(file.data, span.begin, span.end)) for span in header.spans
    }
    return Listing(tensors, storages, {"(header)": Note(header.nbytes)}, flat=True, metadata=header.metadata)


def _refuse_slices(header: Header, file: File) -> None:
    """Refuse a file that says that its tensors are slices of others, as torch.distributed.checkpoint writes them."""
    text = header.metadata.get(_SLICES)
    at = Place(file.where)
    found = at.mapping(at.json(text.encode("utf-8", "replace"), _SLICES), _SLICES) if text else {}
    for name, where in found.items():
        offsets = where.get("saved_offsets") if isinstance(where, dict) else None
        if isinstance(offsets, list) and any(offsets):
            raise FileError(
                f"holds slices of tensors: its part of {name[:80]!r} begins at {offsets[:8]}",
                where=file.where,
                remedy="Put the files together where they were written: torch.distributed.checkpoint has "
                "consolidate_safetensors_files.",
            )
