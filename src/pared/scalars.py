"""Numbers and booleans that callers pass: Python's, NumPy's, or an array or tensor without dimensions."""

from __future__ import annotations

import numbers
from typing import Any, Final

from pared.errors import ConfigError

_MOST: Final = 2**63  # the largest seed that torch takes, and longer than anyone waits


def plain(value: object) -> Any:
    """Turn a NumPy scalar, or an array or tensor without dimensions, into a bool, int or float; keep all others.

    >>> import numpy as np
    >>> plain(np.int64(3)), plain(np.float32(0.5)), plain(np.array(True)), plain("8")
    (3, 0.5, True, '8')
    """
    if type(value) in (bool, int, float, str):
        return value
    item = getattr(value, "item", None)
    if getattr(value, "shape", None) == () and callable(item) and not getattr(value, "is_meta", False):
        value = item()
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def checked_number(where: str, option: str, value: object, *, least: float, whole: bool = False) -> Any:
    """Check an option that is a number, and return it as an int or float.

    Args:
        where: the function or class that has the option, for messages.
        option: its name.
        value: what the caller gave.
        least: the smallest legal value; it has to be below 2^63.
        whole: whether it must be an integer.

    Raises:
        ConfigError: it is not such a number.
    """
    found = plain(value)
    kinds = (int,) if whole else (int, float)
    if isinstance(found, bool) or not isinstance(found, kinds) or not least <= found < _MOST:
        raise ConfigError(
            f"{option}={value!r} is not {'an integer' if whole else 'a number'} of at least {least:g} and below 2^63",
            where=where,
            remedy=f"Pass a number in that range for {option}.",
        )
    return found


def check_choice(where: str, option: str, value: object, choices: tuple[object, ...]) -> None:
    """Check that an option is one of its choices; True is not 1 here.

    Raises:
        ConfigError: it is not one of them.
    """
    scalar = isinstance(value, (bool, int, float, str))  # an array has no one answer to ==
    if not (
        scalar and any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)
    ):
        raise ConfigError(
            f"{option}={value!r} is not one of {', '.join(map(repr, choices))}",
            where=where,
            remedy=f"Choose one of them for {option}.",
        )
