"""Sizes of files, as people write them."""

from __future__ import annotations

import re
from typing import Final

from pared.errors import ConfigError
from pared.scalars import plain

_UNITS: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes from a number or from a number with a unit.

    Raises:
        ConfigError: anything else.

    >>> parse_size("12MB"), parse_size("12 MiB"), parse_size(1000)
    (12000000, 12582912, 1000)
    """
    size = plain(size)
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B)\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    nbytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if nbytes == 0:
        raise ConfigError(
            f"{size!r} is no size",
            where="max_size",
            remedy='Use bytes (12000000), "12MB" (10^6) or "12MiB" (2^20).',
        )
    return nbytes
