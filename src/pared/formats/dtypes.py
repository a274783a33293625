"""Element types by name, as files and artifacts call them, and their values as floats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


# NumPy's type for the elements of an array, by the tensor's dtype. What NumPy lacks comes as its bits: bfloat16 as
# uint16, eight-bit floats as uint8.
ELEMENTS: Final[Mapping[str, str]] = {
    "bool": "?", "uint8": "u1", "int8": "i1", "uint16": "<u2", "int16": "<i2", "uint32": "<u4", "int32": "<i4",
    "uint64": "<u8", "int64": "<i8", "float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8",
    "complex64": "<c8", "complex128": "<c16", "qint8": "i1", "quint8": "u1", "qint32": "<i4",
    "float8_e4m3fn": "u1", "float8_e5m2": "u1", "float8_e4m3fnuz": "u1", "float8_e5m2fnuz": "u1",
    "float8_e8m0fnu": "u1",
}  # fmt: skip


# The types of weights, narrowest first; all of them can be widened to float32 or float64 by `as_floats`.
FLOATING: Final = ("float16", "bfloat16", "float32", "float64")


def as_floats(array: Array, dtype: str) -> Array:
    """The values of an array that `Listing.array` gave, of a dtype in `FLOATING`, in a type that NumPy computes with.

    Args:
        array: of any shape.
        dtype: the tensor's.

    Returns:
        float32, or float64 for float64; the array itself where it is so already.

    >>> as_floats(np.array([0x3F80, 0xC000], "<u2"), "bfloat16").tolist()
    [1.0, -2.0]
    """
    if dtype == "bfloat16":
        wide: Array = (array.astype(np.uint32) << 16).view(np.float32)
        return wide
    return array.astype(np.float32) if dtype == "float16" else array


# float16 keeps 11 significant bits, so every value that is normal in float16 survives with this relative error.
_FLOAT16_ERROR: Final = 2.0**-11


def narrowed(values: Array, dtype: str) -> Array:
    """Floats as numbers of a type of `FLOATING`, rounded to the nearest, ties to even; bfloat16 as its bits.

    Args:
        values: float32 or float64.
        dtype: what they become.

    >>> narrowed(np.array([1.0, -2.0], np.float32), "bfloat16").tolist() == [0x3F80, 0xC000]
    True
    """
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, as in torch
            return values.astype(ELEMENTS[dtype], copy=False)
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def survives_float16(values: Array) -> bool:
    """Whether every value, put into float16, comes back with a relative error of at most 2^-11.

    >>> survives_float16(np.array([0.1, -3.0])), survives_float16(np.array([1e-9]))
    (True, False)
    """
    wide = values.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        error = abs(wide.astype(np.float16).astype(np.float64) - wide)
        return bool((error <= _FLOAT16_ERROR * abs(wide)).all())


# The element types that an artifact may hold, and the bytes of one element.
ITEM_SIZES: Final[Mapping[str, int]] = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2,
    "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip
