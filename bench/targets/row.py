"""A line of the table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What one model loses in one format.

    Args:
        model: its name.
        what: the format, or the formats that were chosen among.
        bits: per weight of what was rounded, scales included.
        nbytes: of these weights in the runtime's file.
        score: the name of the figure; lower is better.
        exact: the float model's.
        nearest: where all weights are rounded to the nearest, with the same format everywhere; None: not measured.
        ours: what pared reaches.
        bar: what it must reach.
        seconds: of processor time that rounding took.
    """

    model: str
    what: str
    bits: float
    nbytes: int
    score: str
    exact: float
    nearest: float | None
    ours: float
    bar: float
    seconds: float

    @property
    def passed(self) -> bool:
        return self.ours <= self.bar
