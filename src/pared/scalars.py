"""Numbers and truth values as callers give them: Python's own, NumPy's, or one element of an array or a tensor."""

from __future__ import annotations

import numbers
from typing import Any, Final

from pared.errors import ConfigError

_MOST: Final = 2**63  # what torch takes for a seed, and more than anyone waits


def plain(value: object) -> Any:
    """A scalar of NumPy, or an array or tensor without dimensions, as Python's bool, int or float; all else as it is.

    >>> import numpy as np
    >>> plain(np.int64(3)), plain(np.float32(0.5)), plain(np.array(True)), plain("8")
    (3, 0.5, True, '8')
    """
    if type(value) in (bool, int, float, str):
        return value
    item = getattr(value, "item", None)
    if getattr(value, "shape", None) == () and callable(item):
        value = item()
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def checked_number(where: str, option: str, value: object, *, least: float, whole: bool = False) -> Any:
    """A number as Python's own.

    Raises:
        ConfigError: it is no number, is less than the least or 2^63 and more, or has a fraction where it must not.
    """
    found = plain(value)
    kinds = (int,) if whole else (int, float)
    if isinstance(found, bool) or not isinstance(found, kinds) or not least <= found < _MOST:
        raise ConfigError(
            f"{option}={value!r} is not a {'whole ' if whole else ''}number of at least {least:g} and below 2^63",
            where=where,
            remedy=f"Pass one number for {option}.",
        )
    return found


def check_choice(where: str, option: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse what is none of the choices; True is not 1 here.

    Raises:
        ConfigError: it is none of them.
    """
    if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices):
        raise ConfigError(
            f"{option}={value!r} is not one of {', '.join(map(repr, choices))}",
            where=where,
            remedy=f"Choose one of them for {option}.",
        )
