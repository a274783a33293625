"""The types of a tensor's elements, by the names that torch gives them, and floats put into other types.

NumPy gets bfloat16 and the floats of eight bits from `ml_dtypes`, so that an array always knows its type. Nothing here
uses torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class ElementType:
    """How the elements of one type are stored.

    Args:
        bits: the size of one element.
        numpy: NumPy's type for them, lowest byte first; None where it has none.
        safetensors: the type's name in a .safetensors file; "" where that format has none.
        in_artifact: whether an artifact may hold tensors of this type.
    """

    bits: int
    numpy: np.dtype[Any] | None = None
    safetensors: str = ""
    in_artifact: bool = False


def _type(kind: DTypeLike, safetensors: str = "", in_artifact: bool = False) -> ElementType:
    dtype = np.dtype(kind)
    return ElementType(8 * dtype.itemsize, dtype, safetensors, in_artifact)


# Types that are quantized have scales of their own elsewhere: their codes are read as whole numbers. Those of less than
# a byte are packed, and not read.
TYPES: Final[Mapping[str, ElementType]] = {
    "bool": _type("?", "BOOL", True),
    "uint8": _type("u1", "U8", True),
    "int8": _type("i1", "I8", True),
    "int16": _type("<i2", "I16", True),
    "int32": _type("<i4", "I32", True),
    "int64": _type("<i8", "I64", True),
    "uint16": _type("<u2", "U16"),
    "uint32": _type("<u4", "U32"),
    "uint64": _type("<u8", "U64"),
    "float16": _type("<f2", "F16", True),
    "bfloat16": _type(ml_dtypes.bfloat16, "BF16", True),
    "float32": _type("<f4", "F32", True),
    "float64": _type("<f8", "F64", True),
    "complex32": ElementType(32),
    "complex64": _type("<c8", "C64", True),
    "complex128": _type("<c16", "", True),
    "float8_e4m3fn": _type(ml_dtypes.float8_e4m3fn, "F8_E4M3"),
    "float8_e5m2": _type(ml_dtypes.float8_e5m2, "F8_E5M2"),
    "float8_e4m3fnuz": _type(ml_dtypes.float8_e4m3fnuz, "F8_E4M3FNUZ"),
    "float8_e5m2fnuz": _type(ml_dtypes.float8_e5m2fnuz, "F8_E5M2FNUZ"),
    "float8_e8m0fnu": _type(ml_dtypes.float8_e8m0fnu, "F8_E8M0"),
    "float4_e2m1fn_x2": ElementType(8),
    "float4_e2m1": ElementType(4),
    "uint4": ElementType(4),
    "int4": ElementType(4),
    "uint2": ElementType(2),
    "int2": ElementType(2),
    "qint8": _type("i1"),
    "quint8": _type("u1"),
    "qint32": _type("<i4"),
    "quint4x2": ElementType(4),
    "quint2x4": ElementType(2),
}

# NumPy's types, by name.
ELEMENTS: Final[Mapping[str, np.dtype[Any]]] = {
    name: kind.numpy for name, kind in TYPES.items() if kind.numpy is not None
}
# The element types that an artifact may hold, and the bytes of one element.
ITEM_SIZES: Final[Mapping[str, int]] = {name: kind.bits // 8 for name, kind in TYPES.items() if kind.in_artifact}

# The types of weights, narrowest first.
FLOATING: Final = ("float16", "bfloat16", "float32", "float64")

# float16 keeps 11 significant bits, so every value that is normal in float16 survives with this relative error.
_FLOAT16_ERROR: Final = 2.0**-11
_AT_ONCE: Final = 1 << 18  # numbers


def is_floating(array: Array) -> bool:
    """Whether an array is of one of the types in `FLOATING`."""
    return array.dtype.name in FLOATING


def bytes_of(array: Array) -> memoryview:
    """The bytes of an array's numbers in C order; not copied if they are in this order already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def as_floats(array: Array) -> Array:
    """Floats in a type that NumPy computes with quickly: 16 bits widened to float32, all others as they are.

    >>> as_floats(np.ones(2, np.float16)).dtype.name, as_floats(np.ones(2)).dtype.name
    ('float32', 'float64')
    """
    return array.astype(np.float32) if array.itemsize == 2 else array


def converted(values: Array, dtype: DTypeLike) -> Array:
    """Floats in another type, rounded to the nearest, ties to even; what it cannot hold becomes infinite, as in torch.

    >>> converted(np.array([1.00390625, 1e39]), ELEMENTS["bfloat16"]).tolist()
    [1.0, inf]
    """
    with np.errstate(over="ignore"):
        return values.astype(dtype, copy=False)


def survives_float16(values: Array) -> bool:
    """Whether every value, put into float16, comes back with a relative error of at most 2^-11.

    >>> survives_float16(np.array([0.1, -3.0])), survives_float16(np.array([1e-9]))
    (True, False)
    """
    flat = values.reshape(-1)

    def survive(some: Array) -> bool:
        wide = some.astype(np.float64)
        error = abs(wide.astype(np.float16).astype(np.float64) - wide)
        return bool((error <= _FLOAT16_ERROR * abs(wide)).all())

    # In pieces: a large table in float64 may not fit in memory, and most weights are refused by the first piece.
    with np.errstate(over="ignore", invalid="ignore"):
        return all(survive(flat[start : start + _AT_ONCE]) for start in range(0, len(flat), _AT_ONCE))
