"""The table of architectures in the documents, and what is said above it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

from bench.architectures.measure import LEAST_DECIBELS, Row
from bench.markdown import markdown

COLUMNS: Final = (
    *("architecture", "parameters", "fit s", "bytes / source", "SQNR dB", "weights alone dB", "call / float"),
    *("loaded equal", "generates equal", "what failed"),
)
SLOWER: Final = 1.1
LEAST_OF_WEIGHTS: Final = 30.0  # dB; a model that keeps less with weights alone is not int8's to keep


def whole(found: Mapping[str, Any]) -> str:
    rows = [Row(**row) for row in found.values() if "skipped" not in row]
    skipped = len(found) - len(rows)
    return f"{_summary(rows, skipped)}\n\n{markdown(COLUMNS, [_line(row) for row in rows])}"


def _summary(rows: Sequence[Row], skipped: int) -> str:
    done = [row for row in rows if not row.error]
    low = [row.name for row in rows if row.sqnr < LEAST_DECIBELS and (row.weights_sqnr or 0) > LEAST_OF_WEIGHTS]
    shares = [row.nbytes / row.source_bytes for row in rows if row.nbytes]
    seconds = [row.fit_seconds for row in done]
    slow = sum(row.call_ratio > SLOWER for row in done)
    return f"""* {len(rows)} architectures, of which {len(done)} went through every step. {skipped} more are not
  measured: the two tables make no small model of them, or they need packages that are not installed.
* Errors that are not of pared's own family: {sum(row.raw for row in rows)}.
* Bytes against the source's state dict: median {median(shares):.3f}, largest {max(shares):.3f}.
* Below {LEAST_DECIBELS:g} dB where weights alone give more than {LEAST_OF_WEIGHTS:g}: {", ".join(low) or "none"}.
* `fit`: median {median(seconds):.1f} s of processor, largest {max(seconds):.0f} s.
* A call takes more than {SLOWER:g} times as long as float's in {slow} of {len(done)}."""


def _line(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.parameters:,}" if row.parameters else "",
        _number(row.fit_seconds, ".1f"),
        f"{row.nbytes / row.source_bytes:.3f}" if row.nbytes else "",
        _number(row.sqnr, ".1f"),
        _number(row.weights_sqnr, ".1f"),
        _number(row.call_ratio, ".2f"),
        _yes(row.equal),
        _yes(row.generates),
        row.error.replace("|", "\\|"),
    )


def _number(value: float | None, how: str) -> str:
    if value is None or math.isnan(value):
        return ""
    return "exact" if value == math.inf else format(value, how)


def _yes(value: bool | None) -> str:
    return {None: "", True: "yes", False: "**no**"}[value]
