"""`docs/peers.svg`: for each model, size against fidelity, and time against fidelity, of every tool."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers import subjects
from bench.peers.families import FLOORS, OURS
from bench.peers.rows import Row, read

PLOT = Path("docs/peers.svg")
_OURS, _FLOOR, _OTHERS = "#c0392b", "#7f8c8d", "#2c6fbb"
_LEAST = 1e-8  # what FP32 itself is put at on a logarithmic axis
# Where a name may stand beside its point, in points, and which of its ends is there; the first that is free is taken.
_HEIGHTS = (3, -9, 12, -18, 21, -27, 30, -36, 39, -45)
_PLACES = [(x, y, side) for y in _HEIGHTS for x, side in ((4, "left"), (-4, "right"))]


def draw(found: Mapping[str, Any]) -> None:
    """Two panels a model."""
    import matplotlib as mpl  # only the bench has it, and only where it draws

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "pared"  # the same file for the same figures
    from matplotlib import pyplot as plt

    names: list[Any] = []
    figure, axes = plt.subplots(len(found), 2, figsize=(13, 4.2 * len(found)), squeeze=False)
    for (name, record), (left, right) in zip(found.items(), axes, strict=True):
        rows = [read(row) for row in record["rows"]]
        subject = subjects.find(name)
        shape = next(iter(subject.shapes()))
        baseline = next((row.bytes for row in rows if row.peer == FLOORS[0]), None) or 1
        names.append(_panel(left, rows, lambda row, base=baseline: None if row.bytes is None else row.bytes / base))
        names.append(_panel(right, rows, lambda row, s=shape: row.timings[s].ratio if s in row.timings else None))
        left.set(title=f"{subject.title}: size", xlabel="file / FP32", ylabel=subject.fidelity)
        right.set(title=f"{subject.title}: {shape}", xlabel="time / FP32 eager", ylabel=subject.fidelity)
    figure.tight_layout()
    for panel in names:
        _spread(panel)
    figure.savefig(PLOT, metadata={"Date": None})


def _panel(axes: Any, rows: Sequence[Row], of: Any) -> list[Any]:
    """A point for each row; the names beside them."""
    names = []
    points = [(row, of(row), row.fidelity) for row in rows]
    shown = [(row, x, y) for row, x, y in points if x is not None and y is not None and math.isfinite(y)]
    decibels = "dB" in subjects.find(rows[0].subject).fidelity
    for row, x, y in shown:
        at = min(y, 100.0) if decibels else max(y, _LEAST)
        color = _OURS if row.peer in OURS else _FLOOR if row.peer in FLOORS else _OTHERS
        axes.scatter([x], [at], color=color, s=28, zorder=3)
        names.append(
            axes.annotate(row.peer, (x, at), fontsize=7, xytext=(4, 3), textcoords="offset points", color=color)
        )
    axes.set_xscale("log")
    axes.set_yscale("linear" if decibels else "log")
    axes.margins(x=0.2)  # room for the last names
    axes.grid(alpha=0.3)
    return names


def _spread(names: Sequence[Any]) -> None:
    """Move names that lie upon others to where there is room."""
    taken: list[Any] = []
    for name in names:
        for x, y, side in _PLACES:
            name.set(position=(x, y), ha=side)
            extent = name.get_window_extent()
            if not any(extent.overlaps(other) for other in taken):
                break
        taken.append(extent)
