"""`python -m bench.front`: loss against time, with sizes as areas, from the tables in `docs/results.md`.

A panel for each model. The README has those of `FRONT`, the page of results has all; each picture is written twice, for
light and for dark pages. The tables hold measurements of one machine; nothing is measured here, so that everybody can
draw the pictures again in a second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

RESULTS = Path("docs/results.md")
PICTURES = Path("docs")
FRONT = ("MiniLM", "EfficientNet-Lite0")
# The tools that are shown, by their names in the tables.
NAMES = {
    "pared": "pared",
    "pared-layers": "pared, layers",
    "pared-graph": "pared, graph",
    "pared-openvino": "pared, OpenVINO",
    "pared-small": "pared, size given",
    "bf16": "bfloat16",
    "openvino-int8": "NNCF",
    "openvino-w8": "NNCF, weights",
    "ort-static": "ONNX Runtime static",
    "ort-dynamic": "ONNX Runtime dynamic",
    "llamacpp-q8": "llama.cpp",
}
_OURS, _CHOSEN, _FLOAT = "pared", "pared", "fp32"
_FORMS = {"pared-layers": "layer by layer", "pared-graph": "as a graph", "pared-openvino": "in OpenVINO"}
_LEAST = 1e-8  # a smaller loss is drawn as this one
_SIZE, _TIME, _LOSS = "file MB (of FP32)", ": ms, of FP32", "loss"
WIDTH, HEIGHT, KEY = 440, 360, 60  # a panel, and the strip below all panels, in pixels
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 40, 50
LETTER, LINE = 6.1, 13  # about what a letter takes across and a line takes down, at 11 pixels
RADIUS = 26  # of a file as large as FP32's
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SHARES = {1.0: "FP32's size", 0.5: "1/2", 0.25: "1/4", 0.125: "1/8"}


@dataclass(frozen=True)
class Theme:
    ink: str
    soft: str
    line: str
    ours: str
    others: str


THEMES = {
    "light": Theme("#1f2328", "#59636e", "#d8dee4", "#c2410c", "#2563a8"),
    "dark": Theme("#e6edf3", "#9198a1", "#30363d", "#fb923c", "#79b8ff"),
}


@dataclass(frozen=True)
class Point:
    """A tool with a model.

    Args:
        share: its time as a share of FP32's.
        loss: its distance from FP32, on the scale of the model's table; for decibels the share of the output's energy.
        size: its files as a share of FP32's.
        form: in which form ours answers; empty for other tools.
    """

    peer: str
    share: float
    loss: float
    size: float
    form: str = ""


@dataclass(frozen=True)
class Panel:
    """One model: what is timed and how loss is measured, FP32's megabytes, and the tools."""

    model: str
    call: str
    loss: str
    megabytes: float
    points: tuple[Point, ...]


def panels(text: str) -> list[Panel]:
    """A panel for each table of models on the page of results, in its order."""
    found = re.findall(rf"^(\| [^|]+ \| {re.escape(_SIZE)} \|.*?)(?:\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    return [_read(table.splitlines()) for table in found]


def _read(lines: Sequence[str]) -> Panel:
    head, *rows = (
        [cell.strip(" *") for cell in line.strip().strip("|").split("|")] for line in lines if "---" not in line
    )
    loss, time = head.index(_LOSS) + 1, next(i for i, name in enumerate(head) if name.endswith(_TIME))
    decibels = head[loss].endswith("dB")
    megabytes, points = 0.0, []
    for cells in rows:
        peer, _, form = cells[0].replace("*", "").partition(" ")
        if peer == _FLOAT:
            megabytes = float(cells[1].split()[0])
        if peer in NAMES and "-" not in (cells[1], cells[loss], cells[time]):
            distance = 10 ** (-float(cells[loss]) / 10) if decibels else float(cells[loss])
            share, size = float(cells[time].split("; ")[1].split()[0]), float(cells[1].split("(")[1].rstrip(")"))
            points.append(Point(peer, share, max(distance, _LEAST), size, form.strip("() ")))
    chosen = next((point.form for point in points if point.peer == _CHOSEN), "")
    shown = tuple(point for point in points if not chosen or _FORMS.get(point.peer) != chosen)
    name = "lost share of the output's energy" if decibels else f"{head[loss]}, to FP32"
    return Panel(head[0], head[time].removesuffix(_TIME), name, megabytes, shown)


@dataclass(frozen=True)
class _Axes:
    """Logarithmic axes around some points."""

    times: tuple[float, float]
    losses: tuple[float, float]

    @classmethod
    def around(cls, points: Sequence[Point]) -> _Axes:
        shares, losses = [*(point.share for point in points), 1.0], [point.loss for point in points]
        # The losses end at powers of ten; circles and names need room beside the outermost points.
        low, high = math.floor(math.log10(min(losses)) - 0.2), math.ceil(math.log10(max(losses)) + 0.2)
        return cls((min(shares) / 1.6, max(shares) * 1.6), (10.0**low, 10.0**high))

    def across(self, share: float) -> float:
        low, high = map(math.log, self.times)
        return round(LEFT + (WIDTH - RIGHT - LEFT) * (math.log(share) - low) / (high - low), 1)

    def up(self, loss: float) -> float:
        low, high = map(math.log, self.losses)
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (math.log(loss) - low) / (high - low), 1)


def _panel(panel: Panel, theme: Theme) -> Iterator[str]:
    right, bottom, axes = WIDTH - RIGHT, HEIGHT - BOTTOM, _Axes.around(panel.points)
    title = f"{panel.model} (FP32: {panel.megabytes:.3g} MB)"
    yield _text(LEFT, 22, title, theme.ink, "start", "font-size='14' font-weight='600'")
    first, last = (round(math.log10(end)) for end in axes.losses)
    for power in range(first, last + 1):
        height = axes.up(10.0**power)
        yield f"<line x1='{LEFT}' x2='{right}' y1='{height}' y2='{height}' stroke='{theme.line}'/>"
        yield _text(LEFT - 8, height + 4, f"10{str(power).translate(RAISED)}" if power else "1", theme.soft, "end")
    for tick in (tick for tick in _TICKS if axes.times[0] < tick < axes.times[1]):
        x = axes.across(tick)
        dashes = "stroke-dasharray='5 4' stroke-width='1.5'" if tick == 1 else ""
        yield f"<line x1='{x}' x2='{x}' y1='{TOP}' y2='{bottom}' stroke='{theme.line}' {dashes}/>"
        yield _text(x, bottom + 17, "FP32" if tick == 1 else f"{tick:g}", theme.soft)
    yield _text((LEFT + right) / 2, HEIGHT - 12, f"time, {panel.call}, share of FP32's", theme.soft)
    yield _text(LEFT + 6, bottom - 6, "↙ better", theme.soft, "start")
    middle = (TOP + bottom) / 2
    yield f"<g transform='rotate(-90 14 {middle})'>{_text(14, middle, panel.loss, theme.soft)}</g>"
    circles = [(point, axes.across(point.share), axes.up(point.loss), _radius(point.size)) for point in panel.points]
    for point, x, y, radius in sorted(circles, key=lambda one: -one[3]):
        color, filled = _color(point.peer, theme), 0.1 if point.peer in _FORMS else 0.35
        circle = f"<circle cx='{x}' cy='{y}' r='{radius}' fill='{color}' fill-opacity='{filled}' stroke='{color}'"
        yield f"{circle} stroke-width='{2 if point.peer == _CHOSEN else 1}'/>"
        yield f"<circle cx='{x}' cy='{y}' r='1.5' fill='{color}'/>"
    yield from _labels(circles, theme)


def _radius(size: float) -> float:
    """The radius of a circle whose area is proportional to the size."""
    return round(RADIUS * math.sqrt(size), 1)


def _color(peer: str, theme: Theme) -> str:
    return theme.ours if peer.startswith(_OURS) else theme.soft if peer == "bf16" else theme.others


_Circle = tuple[Point, float, float, float]


def _places(radius: float) -> Iterator[tuple[float, float, str]]:
    """Where a name may stand around its circle: the first place that is free is taken."""
    slanted = 0.75 * radius
    for away in (0.0, 12.0, 24.0, 36.0, 48.0):
        for down in (4 + away, 4 - away):
            beside = (radius if not away else slanted) + 4
            yield beside, down, "start"
            yield -beside, down, "end"
        yield 0, -radius - 4 - away, "middle"
        yield 0, radius + 12 + away, "middle"


def _labels(circles: Sequence[_Circle], theme: Theme) -> Iterator[str]:
    """Put a name beside each circle, where it hardly covers a circle, and no other name."""
    taken = [(x - 0.8 * r, y - 0.8 * r, x + 0.8 * r, y + 0.8 * r) for _, x, y, r in circles]
    for point, x, y, radius in sorted(circles, key=lambda one: (one[0].peer != _CHOSEN, one[1])):
        words = NAMES[point.peer] + (f", {point.form}" if point.peer == _CHOSEN and point.form else "")
        for dx, dy, side in _places(radius):
            start = x + dx - len(words) * LETTER * {"start": 0, "middle": 0.5, "end": 1}[side]
            box = (start, y + dy - LINE + 3, start + len(words) * LETTER, y + dy + 3)
            inside = box[0] > LEFT and box[2] < WIDTH and box[1] > TOP - 8 and box[3] < HEIGHT - BOTTOM
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                bold = "font-weight='600'" if point.peer == _CHOSEN else ""
                color = theme.ours if point.peer.startswith(_OURS) else theme.ink
                yield _text(round(x + dx, 1), round(y + dy, 1), words, color, side, bold)
                break


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _text(x: float, y: float, words: str, color: str, anchor: str = "middle", more: str = "") -> str:
    return f"<text x='{x}' y='{y}' text-anchor='{anchor}' fill='{color}' {more}>{escape(words)}</text>"


def _key(theme: Theme, width: float, top: float) -> Iterator[str]:
    """What the areas mean."""
    middle, x = top + KEY / 2, float(LEFT)
    yield _text(x, middle + 4, "area of a circle: size of the file", theme.soft, "start")
    x += 34 * LETTER
    for share, words in _SHARES.items():
        radius = _radius(share)
        x += radius
        yield f"<circle cx='{x:.1f}' cy='{middle}' r='{radius}' fill='none' stroke='{theme.soft}'/>"
        yield _text(round(x + radius + 5, 1), middle + 4, words, theme.soft, "start")
        x += radius + len(words) * LETTER + 18
    assert x < width, "the key needs more room"


def picture(text: str, theme: Theme, models: Iterable[str] = ()) -> str:
    """The panels, two in a row, from the page of results.

    Args:
        models: those that are shown; default: all.
    """
    asked = set(models)
    shown = [panel for panel in panels(text) if panel.points and (not asked or panel.model in asked)]
    across = 2
    rows = -(-len(shown) // across)
    width, height = WIDTH * across, HEIGHT * rows + KEY
    drawn = (
        f"<g transform='translate({WIDTH * (i % across)} {HEIGHT * (i // across)})'>{''.join(_panel(panel, theme))}</g>"
        for i, panel in enumerate(shown)
    )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' "
        "font-family='system-ui, sans-serif' font-size='11'><title>Loss against time</title>"
        f"{''.join(drawn)}{''.join(_key(theme, width, HEIGHT * rows))}</svg>\n"
    )


def pictures(text: str) -> Mapping[str, str]:
    """The files below `docs`, by name."""
    chosen: Mapping[str, Sequence[str]] = {"loss-time": FRONT, "loss-time-all": ()}
    return {
        f"{name}-{mode}.svg": picture(text, theme, models)
        for name, models in chosen.items()
        for mode, theme in THEMES.items()
    }


def draw() -> None:
    for name, drawn in pictures(RESULTS.read_text(encoding="utf-8")).items():
        (PICTURES / name).write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    draw()
