"""OpenVINO's own files: integer constants that products decode as they go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pared.formats.groups.grid import GroupGrid, Zero
from pared.targets.target import Offer, Role, Target

_PRODUCTS: Final[frozenset[Role]] = frozenset(("linear", "table", "head"))
_ANY: Final[frozenset[Role]] = _PRODUCTS | {"other"}


def element_type(bits: int, zero: Zero) -> str:
    """The type of a constant with such codes.

    Signed codes with zero points, which would also be possible, are multiplied with inputs in floats only.
    """
    return f"i{bits}" if zero == "fixed" and bits != 2 else f"u{bits}"  # there is no i2


def _bytes(bits: int, group: int | None, zero: Zero) -> Callable[[int, int], int]:
    def nbytes(rows: int, columns: int) -> int:
        groups = rows * (columns // group if group else 1)
        zeros = -(-groups * bits // 8) if zero == "code" else 0
        return -(-rows * columns * bits // 8) + 2 * groups + zeros

    return nbytes


def _offer(bits: int, group: int | None, zero: Zero = "fixed", roles: frozenset[Role] = _PRODUCTS) -> Offer:
    name = f"{element_type(bits, zero)} {f'g{group}' if group else 'row'}"
    return Offer(name, GroupGrid(bits, group, zero, "float16"), _bytes(bits, group, zero), group or 8 // bits, roles)


TARGET: Final = Target(
    name="openvino",
    title="OpenVINO IR, openvino-genai",
    extra="openvino",
    packages=("openvino", "openvino_tokenizers"),
    offers=(
        _offer(8, 32),
        _offer(8, 128),
        _offer(8, None, roles=_ANY),
        *(_offer(4, group, zero) for group in (32, 64, 128, None) for zero in ("code", "fixed")),
        *(_offer(2, group, "code") for group in (32, 64, 128)),
    ),
    takes="graph",
)
