"""Scatter plots on log scales as SVG: a panel per group of points, with the diagonal and a band of a factor of two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

Points = Sequence[tuple[float, float]]

# In pixels: a panel, and its margins to the left, right, top and bottom.
WIDTH, HEIGHT = 380, 380
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 34, 46
INK, GREY, DOT, BAND = "#222222", "#dddddd", "#1f6fb4", "#eef3f8"
FACTOR = 2.0
PER_ROW = 2


def picture(groups: Mapping[str, Points], across: str, up: str) -> str:
    """The panels, two in a row, each with equal scales on both axes."""
    rows = -(-len(groups) // PER_ROW)
    width, height = WIDTH * min(PER_ROW, len(groups)), HEIGHT * rows
    panels = (
        f'<g transform="translate({i % PER_ROW * WIDTH} {i // PER_ROW * HEIGHT})">{_panel(*group, across, up)}</g>'
        for i, group in enumerate(groups.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
        f"{''.join(panels)}</svg>\n"
    )


def _panel(title: str, points: Points, across: str, up: str) -> str:
    values = [math.log10(value) for point in points for value in point]
    low, high = math.floor(min(values)), math.ceil(max(values))
    side = WIDTH - LEFT - RIGHT
    bottom = HEIGHT - BOTTOM

    def x(log: float) -> float:
        return round(LEFT + side * (log - low) / (high - low), 1)

    def y(log: float) -> float:
        return round(bottom - (bottom - TOP) * (log - low) / (high - low), 1)

    room = math.log10(FACTOR)
    band = ((low, low), (low, low + room), (high - room, high), (high, high), (high, high - room), (low + room, low))
    corners = " ".join(f"{x(a)},{y(b)}" for a, b in band)
    drawn = [f'<polygon points="{corners}" fill="{BAND}"/>']
    every = max(1, (high - low) // 6)
    for power in range(low, high + 1, every):
        drawn += [_line(x(power), TOP, x(power), bottom, GREY), _line(LEFT, y(power), LEFT + side, y(power), GREY)]
        drawn += [_text(x(power), bottom + 17, f"1e{power}"), _text(LEFT - 7, y(power) + 4, f"1e{power}", "end")]
    drawn += [_line(LEFT, bottom, LEFT + side, bottom, INK), _line(LEFT, TOP, LEFT, bottom, INK)]
    drawn.append(_line(x(low), y(low), x(high), y(high), INK))
    drawn += [
        f'<circle cx="{x(math.log10(a))}" cy="{y(math.log10(b))}" r="3" fill="{DOT}" fill-opacity="0.7"/>'
        for a, b in points
    ]
    middle = (TOP + bottom) / 2
    drawn += [_text(LEFT + side / 2, 20, title), _text(LEFT + side / 2, HEIGHT - 8, across)]
    drawn.append(f'<g transform="rotate(-90 14 {middle})">{_text(14, middle, up)}</g>')
    return "".join(drawn)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}"/>'


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{INK}">{escape(words)}</text>'
