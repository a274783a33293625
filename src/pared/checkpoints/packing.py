"""One tensor of a checkpoint as an artifact will hold it: the format of its numbers, and the bytes of its parts.

Only the numbers themselves are known. A float tensor of two or more dimensions goes on a grid with one step per row,
unless its values lie on a grid already; one of fewer dimensions becomes float16 if that keeps every value; all other
tensors are stored as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from pared.artifact.index import Entry
from pared.artifact.parts import placed
from pared.checkpoints.rates import steps_at_level, steps_at_rate
from pared.checkpoints.selection import Kept
from pared.formats.dtypes import ELEMENTS, FLOATING, Array, as_floats, converted, survives_float16
from pared.formats.exact_grids import ExactGrid, find_exact_grid, is_whole, whole_grid
from pared.formats.grids import CODE_LIMITS, CodeType, encode, finest_steps, magnitudes, refuse_damaged
from pared.formats.streams import EncodedPart, Steps, encode_codes, encode_steps
from pared.formats.views import View, matrix_of, plain_view

INT8_BITS: Final = 8.0
FLOAT_BITS: Final = 16.0

# The spacing of float16 near zero is 2^-24: too coarse for weights that are typically smaller than this.
_SMALLEST_HALF: Final = 2.0**-14
_LARGEST_HALF: Final = 65504.0
# The largest magnitude of a tensor on a grid, whose steps and products of steps and codes are finite in float32.
_LEAST, _MOST = 2.0**-100, 2.0**126


@dataclass(frozen=True)
class Fineness:
    """How finely a tensor is rounded.

    Args:
        bits: the coded stream's bits per weight. 8: int8 with the finest step of each row. 16: float16.
        level: overrides bits: the average step of a row is 2^(level / 8).
    """

    bits: float = INT8_BITS
    level: float | None = None


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A tensor, encoded.

    Args:
        format: the format's fields in the artifact's index.
        parts: the encoded bytes, by the name of the part.
        view: which dimensions share a step; None unless the format is a grid.
        bits: the requested bits per weight; None if no rate was requested.
        because: the reason for the format, for users.
    """

    format: Mapping[str, str]
    parts: Mapping[str, EncodedPart]
    view: View | None = None
    bits: float | None = None
    because: str = ""

    @property
    def nbytes(self) -> int:
        """The total size of all parts."""
        return sum(len(part.payload) for part in self.parts.values())


def goes_on_grid(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this element type and shape is rounded to a grid."""
    flat = len(shape) < 2 or math.prod(shape) == shape[0]  # with one number per row, a step saves nothing
    return dtype in FLOATING and not flat and 0 not in shape


def pack(array: Array, target: Fineness, name: str, threads: int = 1) -> PackedTensor:
    """Choose the format of a tensor, and encode it.

    Args:
        array: the tensor, as `Listing.array` returns it.
        target: how finely to round.
        name: the tensor's name, for error messages.
        threads: the number of threads to use.

    Raises:
        ModelError: it holds NaN, or infinities that are not a mask.
    """
    dtype = array.dtype.name
    if dtype not in FLOATING or array.size == 0:
        return exact(array, f"{dtype} is kept exactly")
    if not goes_on_grid(dtype, array.shape):
        return _flat(array, name)
    view = plain_view(array.shape, name)
    matrix = matrix_of(array, view)
    largest = magnitudes(matrix, threads)
    if not np.isfinite(largest).all():
        return _unbounded(array, name)
    found = find_exact_grid(array, target.bits if target.level is None else INT8_BITS)
    # A lossless grid may be at most an octave finer than the planned step.
    finest = 0.0 if target.level is None else 2.0 ** (target.level / 8 - 1)
    if found is not None and float(found.step.max()) >= finest:
        return _on_own_grid(found, threads)
    if is_whole(array):  # a mask or indices
        found = found or whole_grid(array)
        return exact(array, "its whole numbers are kept exactly") if found is None else _on_own_grid(found, threads)
    is_zero = not largest.any() and (array.itemsize < 8 or not array.any())  # float64 may be zero in float32 only
    if not is_zero and not _LEAST <= largest.max() <= _MOST:
        return exact(array, "its values are beyond what a grid can hold")
    if target.level is None and target.bits == FLOAT_BITS:
        return _half(array, largest)
    kind, step = _steps(matrix, largest, target)
    codes = encode(matrix, step, kind, threads).reshape(array.shape)
    parts = encode_codes(codes, view, threads) | {"step": encode_steps(step)}
    return PackedTensor(_grid(kind), parts, view, target.bits if target.level is None else None)


def _on_own_grid(found: ExactGrid, threads: int) -> PackedTensor:
    parts = encode_codes(found.codes, found.view, threads) | {"step": encode_steps(found.step)}
    because = "its numbers lie on this grid already: nothing is lost"
    return PackedTensor(_grid(found.codes.dtype.name), parts, found.view, None, because)


def _steps(matrix: Array, largest: Steps, target: Fineness) -> tuple[CodeType, Steps]:
    if target.level is not None:
        step = steps_at_level(target.level, finest_steps(largest, "int16"))
        with np.errstate(over="ignore"):  # an infinite step has no codes
            kind: CodeType = "int8" if (largest <= (CODE_LIMITS["int8"] + 0.5) * step).all() else "int16"
        return kind, step
    kind = "int8" if target.bits <= INT8_BITS else "int16"
    finest = finest_steps(largest, kind)
    return kind, finest if target.bits == INT8_BITS else steps_at_rate(matrix, target.bits, finest, kind)


def _grid(codes: str) -> dict[str, str]:
    return {"tag": "grid", "codes": codes}


def exact(array: Array, because: str) -> PackedTensor:
    """Keep every number of a tensor."""
    # A contiguous tensor of a mapped file is not copied.
    plain = array.reshape(-1).view(np.uint8).data if array.flags.c_contiguous else array.tobytes()
    return PackedTensor({"tag": "raw"}, {"values": EncodedPart(plain)}, because=because)


def _float(array: Array, to: str, because: str) -> PackedTensor:
    values = converted(array, ELEMENTS[to])
    return PackedTensor({"tag": "float", "dtype": to}, {"values": EncodedPart(values.tobytes())}, because=because)


def _flat(array: Array, name: str) -> PackedTensor:
    """Encode a tensor of at most one dimension, or with one number per row."""
    values = as_floats(array)
    if not np.isfinite(values).all():
        return _unbounded(array, name)
    kind = "one number for each row" if array.ndim > 1 else "one dimension" if array.ndim else "a single number"
    if array.itemsize == 2:
        return exact(array, f"{kind}: kept exactly")
    if is_whole(array) and (array != converted(values, np.float16)).any():
        return exact(array, f"{kind}: its whole numbers are kept exactly")
    if survives_float16(values):
        return _float(array, "float16", f"{kind}: every value survives float16")
    if array.itemsize == 8 and (values == converted(values, np.float32)).all():
        return _float(array, "float32", f"{kind}: float32 holds every value")
    return exact(array, f"{kind}: its values do not survive float16, so they are kept exactly")


def _half(array: Array, largest: Steps) -> PackedTensor:
    """Encode a tensor in 16 bits per number."""
    if array.dtype.name == "bfloat16":
        return exact(array, "bfloat16 is kept exactly")
    values = as_floats(array)
    typical = math.sqrt(float(np.mean(np.square(values, dtype=np.float64))))
    if typical >= _SMALLEST_HALF and largest.max() <= _LARGEST_HALF:
        return _float(array, "float16", "")
    return exact(array, "its values do not survive float16")


def _unbounded(array: Array, name: str) -> PackedTensor:
    """Encode a tensor that is not finite in float32: a mask, or large float64 values; anything else is damage."""
    values = as_floats(array)
    finite = np.isfinite(values)
    if finite.all():
        return exact(array, "its values are beyond float32")
    if np.isnan(values).any() or len(np.unique(values[finite])) > 1:
        refuse_damaged(array, name)
    return exact(array, "a mask of infinities is kept exactly")


def entry_of(kept: Kept, packed: PackedTensor, end: int, factor: float = 1.0) -> Entry:
    """The index entry of a tensor whose parts follow offset `end` in the data.

    Args:
        kept: its names, element type and shape.
        packed: its encoded parts.
        end: the offset at which the previous part ends.
        factor: scales the parts' lengths, where `packed` encodes only a sample of the tensor.
    """
    return Entry(
        names=kept.names,
        kind=kept.kind,
        dtype=kept.held.dtype,
        shape=kept.held.shape,
        format=packed.format,
        view=(packed.view.split, packed.view.rows) if packed.view is not None else None,
        bits=packed.bits,
        because=packed.because,
        parts=placed(packed.parts, end, factor),
    )
