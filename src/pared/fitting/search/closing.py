"""Closing in on a size: predicted sizes are a little off, so models are coded until one fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from pared import allocate
from pared.allocate import Choice, Table

# Attempts that correct the planned bytes by what the last file was off, then attempts at ever fewer planned bytes until
# a file fits; it is close enough at this share of the bytes.
_CORRECTING_ATTEMPTS: Final = 10
_MAX_ATTEMPTS: Final = 60
_FEWER_BYTES: Final = 0.97
_CLOSE_ENOUGH: Final = 0.998
_ALIGNMENT: Final = 64  # bytes: a file grows in steps of this size


def closed_in(table: Table, wanted: int, overhead: float, real: Callable[[Choice], int]) -> Choice | None:
    """The choice of least damage whose file is at most `wanted` bytes large; None if even the smallest is larger.

    Args:
        table: the options of all tensors, with predicted bytes.
        wanted: the size of the file, at most.
        overhead: about its bytes beside those that the options count.
        real: makes the file of a choice, and says how large it is; called up to 60 times.
    """
    planned = float(wanted)
    best: Choice | None = None
    fitting, too_many = 0.0, math.inf  # planned bytes whose file fits, and whose file does not
    for attempt in range(_MAX_ATTEMPTS):
        budget = planned - overhead
        choice = allocate.fill(table, allocate.within_bytes(table, budget), budget)
        size = real(choice)
        if size <= wanted:
            best, fitting = choice, planned
        else:
            too_many = planned
        if best is None and choice.nbytes > budget:
            break  # there is nothing smaller
        if best is not None and (attempt >= _CORRECTING_ATTEMPTS or wanted >= size > _CLOSE_ENOUGH * wanted):
            break
        if attempt < _CORRECTING_ATTEMPTS:
            planned += wanted - size - (_ALIGNMENT if size > wanted else 0)
        else:
            planned *= _FEWER_BYTES
        if best is not None and not fitting < planned < too_many:
            planned = (fitting + too_many) / 2 if math.isfinite(too_many) else fitting * 1.01
    return best
