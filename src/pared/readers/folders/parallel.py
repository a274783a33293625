"""Checkpoints of Llama, of which each process saved a slice of every tensor: whether there was only one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from pared.files.checks import Place
from pared.files.disk import open_file
from pared.readers.folders.sets import one_of_several
from pared.readers.listing import Listing

_NAME: Final = re.compile(r"consolidated\.\d\d\.pth$")
_PARAMETERS: Final = "params.json"
_QUERY: Final = "layers.0.attention.wq.weight"  # a row for each head and each of its dimensions
_LARGEST: Final = 1 << 16  # bytes


def check_parallel(path: Path, listing: Listing) -> None:
    """Compare the only file of a checkpoint of Llama with the sizes in `params.json` beside it.

    Args:
        path: the file; of others nothing is checked.
        listing: what it holds.

    Raises:
        FileError: it holds slices.
        CorruptError: `params.json` is not JSON.
    """
    beside = path.parent / _PARAMETERS
    if not _NAME.match(path.name) or not beside.is_file() or not 0 < beside.stat().st_size <= _LARGEST:
        return
    at = Place(str(beside))
    with open_file(beside) as file:
        expected = _rows(at.mapping(at.json(bytes(file.data), "it"), "it"))
    rows = next((held.shape[0] for held in listing.tensors if held.name == _QUERY and held.shape), 0)
    if expected is not None and 0 < rows < expected:
        raise one_of_several(path, -(-expected // rows), slices=True)


def _rows(parameters: dict[str, Any]) -> int | None:
    """The rows of a whole query matrix; None if the parameters do not say."""
    width, heads = parameters.get("dim"), parameters.get("n_heads")
    if type(width) is not int or type(heads) is not int or heads <= 0 or width <= 0:
        return None
    inside = parameters.get("head_dim", width // heads)
    return heads * inside if type(inside) is int else None
