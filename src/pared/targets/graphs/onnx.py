"""ONNX files as ONNX Runtime executes them: products with grouped codes, tables of grouped codes, and rows of int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pared.formats.groups.grid import GroupGrid, Zero
from pared.targets.target import Offer, Role, Target

_PRODUCTS: Final[frozenset[Role]] = frozenset(("linear", "table", "head"))
_ANY: Final[frozenset[Role]] = _PRODUCTS | {"other"}


def padded(columns: int, group: int) -> int:
    """The columns of a row in the file, where only whole groups are held."""
    return -(-columns // group) * group


def _bytes(bits: int, group: int, zero: Zero) -> Callable[[int, int], int]:
    def nbytes(rows: int, columns: int) -> int:
        wide = padded(columns, group)
        groups = wide // group
        zeros = -(-groups * bits // 8) if zero == "code" else 0  # which are packed row by row
        return rows * (wide * bits // 8 + 2 * groups + zeros)

    return nbytes


def _grouped(bits: int, group: int, zero: Zero) -> Offer:
    """The codes of `MatMulNBits` and `GatherBlockQuantized`.

    Their steps are of the type of their inputs, which is float32 for most models; but steps of float16 that are cast
    to it take half the bytes, and the runtime casts them once, when it loads the file.
    """
    name = f"int{bits} g{group}{' zero' if zero == 'code' else ''}"
    return Offer(name, GroupGrid(bits, group, zero, "float16"), _bytes(bits, group, zero), 8 // bits, _PRODUCTS)


TARGET: Final = Target(
    name="onnx",
    title="ONNX: ONNX Runtime",
    extra="onnx",
    packages=("onnx", "onnxscript"),
    offers=(
        _grouped(8, 32, "fixed"),
        _grouped(8, 128, "fixed"),
        # A row's step and its zero point, for whatever reads the weight: `DequantizeLinear`.
        Offer("int8 row", GroupGrid(8, None, "fixed", "float32"), lambda rows, columns: rows * (columns + 5), 1, _ANY),
        *(_grouped(4, group, zero) for group in (32, 64, 128) for zero in ("code", "fixed")),
        *(_grouped(2, group, "code") for group in (32, 64, 128)),
    ),
    takes="graph",
)
