"""Checks of single values that stand in a file and cannot be trusted yet."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from pared.errors import DANGEROUS, CorruptError, UnsafeError

_LARGEST_RANK: Final = 64  # numpy's
_LARGEST_PRODUCT: Final = 1 << 48  # of the sizes, except zeros: strides in bytes fit 64 bits


@dataclass(frozen=True)
class Place:
    """A place in a file; its methods check values that stand there, and name the place where one is wrong.

    >>> Place("file").fields({"a": 1}, "its header", ["a"])
    {'a': 1}
    """

    place: str

    def fail(self, what: str) -> NoReturn:
        """Raise CorruptError: the file is damaged."""
        raise CorruptError(what, where=self.place)

    def refuse(self, what: str) -> NoReturn:
        """Raise UnsafeError: reading on would be unsafe."""
        raise UnsafeError(what, where=self.place, remedy=DANGEROUS)

    def json(self, text: bytes, what: str) -> object:
        """Parse JSON in UTF-8, without repeated keys, NaN or infinity."""
        try:
            return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            self.fail(f"{what} is not valid JSON: {error}")

    def fields(self, value: object, what: str, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
        """Check that the value is an object with all required keys, and no others except the optional ones."""
        known = self.mapping(value, what)
        required = frozenset(required)
        if known.keys() == required:  # most objects
            return known
        if missing := required - known.keys():
            self.fail(f"{what} lacks {min(missing)!r}")
        if unknown := known.keys() - required - frozenset(optional):
            self.fail(f"{what} has an unknown field {min(unknown)!r}")
        return known

    def mapping(self, value: object, what: str) -> dict[str, Any]:
        """Check that the value is an object."""
        return value if isinstance(value, dict) else self.fail(f"{what} is not an object")

    def sequence(self, value: object, what: str) -> list[Any]:
        """Check that the value is a list."""
        return value if isinstance(value, list) else self.fail(f"{what} is not a list")

    def text(self, value: object, what: str) -> str:
        """Check that the value is a string that can be written and printed."""
        if isinstance(value, str) and value.isascii():
            return value
        # A lone surrogate is legal in JSON, and can be neither written nor printed.
        sound = isinstance(value, str) and value.encode("utf-8", "replace").decode("utf-8") == value
        return str(value) if sound else self.fail(f"{what} is not printable text")

    def one_of(self, value: object, legal: Iterable[str], what: str) -> str:
        """Check that the value is one of the legal strings."""
        known = self.text(value, what)
        return known if known in legal else self.fail(f"{what} {known[:80]!r} is not one of {', '.join(legal)}")

    def whole(self, value: object, what: str, bound: int = 1 << 63) -> int:
        """Check that the value is an integer of at least 0 and below the bound."""
        if type(value) is not int or not 0 <= value < bound:
            self.fail(f"{what} is not an integer from 0 to {bound - 1}")
        return value

    def within(self, value: object, what: str, legal: range) -> int:
        """Check that the value is an integer in a range."""
        if type(value) is not int or value not in legal:
            self.fail(f"{what} is not an integer from {legal[0]} to {legal[-1]}")
        return value

    def integer(self, value: object, what: str) -> int:
        """Check that the value is an integer of 64 bits."""
        if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
            self.fail(f"{what} is not an integer of 64 bits")
        return value

    def number(self, value: object, what: str) -> float:
        """Check that the value is a number that a float can hold."""
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            self.fail(f"{what} is not a finite number")
        return value

    def shape(self, value: object, what: str) -> tuple[int, ...]:
        """Check that the value is a tensor's shape: a list of integers with a product that strides can count."""
        sizes, one = tuple(self.sequence(value, f"its {what}")), f"a size in its {what}"
        for size in sizes:
            self.whole(size, one)
        if len(sizes) > _LARGEST_RANK or math.prod(size or 1 for size in sizes) > _LARGEST_PRODUCT:
            self.fail(f"its {what} is larger than any tensor")
        return sizes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known = dict(pairs)
    if len(known) != len(pairs):
        raise ValueError("an object has the same key twice")
    return known


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
