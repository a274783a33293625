"""The bytes of a grid with groups, and back. `docs/format.md` is the specification."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from pared.errors import CorruptError
from pared.formats import dtypes, entropy
from pared.formats.entropy import Codes, Coding
from pared.formats.groups.grid import Floats, GroupGrid, Numbers
from pared.formats.streams import EncodedPart, decode_codes, encode_codes
from pared.formats.views import View

FLOATS: Final = ("least", "step")  # the parts of the type that steps have


def streams(grid: GroupGrid, parts: Mapping[str, Numbers], view: View) -> dict[str, EncodedPart]:
    """The bytes to store, by part, in the order of the data, which is that of their names.

    Args:
        grid: the grid.
        parts: "codes" in the tensor's shape, the others as `GroupGrid.shapes` has them.
        view: what the rows of the tensor are.
    """
    found = encode_codes(parts["codes"], view)
    for name in sorted(parts.keys() - {"codes"}):
        found[name] = _floats(parts[name], grid) if name in FLOATS else _coded(parts[name].view(np.int8))
    return found


def parts(grid: GroupGrid, found: Mapping[str, EncodedPart], shape: tuple[int, ...], view: View) -> dict[str, Numbers]:
    """The inverse of `streams`; memory is bounded by the shape, which the caller has to check.

    Raises:
        CorruptError: a part has the wrong length, or numbers that the grid does not have.
    """
    codes = decode_codes(found, shape, view, np.int8)
    check_codes(codes, grid)
    return {"codes": codes} | beside_codes(grid, found, view)


def beside_codes(grid: GroupGrid, found: Mapping[str, EncodedPart], view: View) -> dict[str, Numbers]:
    """All parts but the codes.

    Raises:
        CorruptError: as `parts`.
    """
    numbers: dict[str, Numbers] = {}
    for name, size in grid.shapes(view.n_rows, view.n_columns).items():
        if name in FLOATS:
            numbers[name] = _as_floats(found[name], grid, name, math.prod(size)).reshape(size)
        elif name != "codes":
            values = entropy.decode(found[name].payload, found[name].coding, math.prod(size), np.int8, threads=1)
            unsigned = name != "zero" and not grid.signed
            numbers[name] = (values.view(np.uint8) if unsigned else values).reshape(size)
            _check(numbers[name], name, *((grid.low, grid.high) if name == "zero" else grid.multiples))
    return numbers


def check_codes(codes: Codes, grid: GroupGrid) -> None:
    """Refuse codes that the grid does not have.

    Raises:
        CorruptError: there are such.
    """
    _check(codes, "code", grid.low, grid.high)


def _floats(values: Numbers, grid: GroupGrid) -> EncodedPart:
    """Steps or least values: those of 16 bits as whole numbers, from their median where that is smaller."""
    plain = values.astype(dtypes.ELEMENTS[grid.step])
    if grid.step == "float32":
        return EncodedPart(plain.tobytes())
    bits = plain.view(np.int16)
    base = int(np.partition(bits.reshape(-1), bits.size // 2)[bits.size // 2]) if bits.size else 0
    near = _coded(bits - np.int16(base), Coding(low_bits=4))  # which wraps around
    far = _coded(bits, Coding(low_bits=8))  # of both signs, or of many sizes
    return replace(near, base=base) if len(near.payload) < len(far.payload) else far


def _as_floats(part: EncodedPart, grid: GroupGrid, name: str, count: int) -> Floats:
    kind = dtypes.ELEMENTS[grid.step]
    if grid.step == "float32":
        if len(part.payload) != 4 * count:
            raise CorruptError(f"its {name} has {len(part.payload)} bytes where {count} numbers need {4 * count}")
        plain = np.frombuffer(part.payload, kind)
    else:
        bits = entropy.decode(part.payload, part.coding, count, np.int16, threads=1)
        plain = (bits + np.int16(part.base or 0)).view(kind)
    values: Floats = plain.astype(np.float32)
    if not np.isfinite(values).all():
        raise CorruptError(f"a {name} is not finite")
    return values


def _coded(numbers: Numbers, coding: Coding | None = None) -> EncodedPart:
    stream = entropy.encode(numbers, threads=1, coding=coding)
    return EncodedPart(stream.payload, stream.coding)


def _check(numbers: Numbers, what: str, low: int, high: int) -> None:
    if numbers.size and (numbers.min() < low or numbers.max() > high):
        raise CorruptError(f"a {what} is not between {low} and {high}")
