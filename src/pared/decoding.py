"""The tensors of an artifact as NumPy arrays: what `artifact` reads into torch, for those that do without torch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pared.container import Entry
from pared.errors import CorruptError
from pared.readers import ELEMENTS, Array, as_floats
from pared.streams import Part, decode_codes, decode_steps
from pared.views import View

_DAMAGED: Final = "Fetch the file again; it is damaged."


def payloads(entry: Entry, data: memoryview) -> dict[str, Part]:
    """The bytes of a tensor's parts.

    Args:
        entry: of the tensor, in the index.
        data: the artifact's second record.

    Raises:
        CorruptError: they do not have their checksum.
    """
    found, crc32 = {}, 0
    for name, part in entry.parts.items():
        payload = data[part.offset : part.end]
        crc32 = zlib.crc32(payload, crc32)
        if part.crc32 is not None:
            if crc32 != part.crc32:
                raise CorruptError("the checksum of its numbers does not match", where=entry.name, remedy=_DAMAGED)
            crc32 = 0
        found[name] = Part(payload, part.coding, part.rows, part.base)
    return found


def decode(entry: Entry, data: memoryview) -> Array:
    """The numbers of a tensor, equal bit for bit to what `load` gives the model.

    Args:
        entry: of the tensor, in an index that `container.parse_index` has checked.
        data: the artifact's second record.

    Returns:
        an array of the tensor's shape and of its source's type, as `Listing.array` would give it: see
        `readers.ELEMENTS`.

    Raises:
        CorruptError: the bytes contradict the index or their checksum.
    """
    parts = payloads(entry, data)
    try:
        if entry.format["tag"] == "grid":
            return narrowed(_on_grid(entry, parts), entry.dtype)
        stored = entry.format.get("dtype", entry.dtype)
        values = np.frombuffer(parts["values"].payload, ELEMENTS[stored]).reshape(entry.shape)
        return values if stored == entry.dtype else narrowed(as_floats(values, stored), entry.dtype)
    except CorruptError as error:
        raise CorruptError(error.what, where=entry.name, remedy=error.remedy) from error


def _on_grid(entry: Entry, parts: Mapping[str, Part]) -> NDArray[np.float32]:
    """`step[row] * code`, in float32."""
    split, rows = entry.view or (entry.shape, (0,))
    view = View(split, rows)
    codes = decode_codes(parts, entry.shape, view, entry.format["codes"])
    step = parts["step"]
    if step.base is not None:
        steps = decode_steps(step, view.n_rows)
    else:
        steps = np.frombuffer(step.payload, "<f4")
        if not (np.isfinite(steps) & (steps >= 0)).all():
            raise CorruptError("a step is negative or not finite", remedy=_DAMAGED)
    spread = steps.reshape([n if i in rows else 1 for i, n in enumerate(split)])
    values: NDArray[np.float32] = codes.reshape(split).astype(np.float32)
    values *= spread
    return values.reshape(entry.shape)


def narrowed(values: NDArray[Any], dtype: str) -> Array:
    """Floats in another floating type, rounded to the nearest, ties to even; the inverse of `readers.as_floats`.

    Args:
        values: float32 or float64, of any shape.
        dtype: one of `readers.FLOATING`; bfloat16 comes as its bits.

    >>> [hex(bits) for bits in narrowed(np.array([1.0, -2.0, 1.00390625], np.float32), "bfloat16")]
    ['0x3f80', '0xc000', '0x3f80']
    """
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, as in torch
            return values.astype(ELEMENTS[dtype], copy=False)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    nan: Array = np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2")
    return nan.reshape(values.shape)
