"""`python -m bench.front`: the README's picture, size against loss, from the tables in `docs/results.md`.

Two files are written, for light and for dark pages. The tables hold measurements of one machine; nothing is measured
here, so that everybody can draw the picture again in a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

RESULTS = Path("docs/results.md")
PICTURES = Path("docs")


@dataclass(frozen=True)
class Panel:
    """One model: the title of its table, its column of loss, and the ranges of both axes."""

    model: str
    column: str
    loss: str
    megabytes: tuple[float, float]
    losses: tuple[float, float]
    ticks: tuple[float, ...]


PANELS = (
    Panel("MiniLM", "1 - cos", "1 - cosine to FP32", (9, 75), (1e-5, 1), (10, 20, 40)),
    Panel("EfficientNet-Lite0", "KL, nat", "KL to FP32, nats", (2.5, 24), (1e-5, 5), (3, 5, 10, 20)),
)
TITLES = {"MiniLM": "all-MiniLM-L6-v2 (FP32: 90.9 MB)", "EfficientNet-Lite0": "EfficientNet-Lite0 (FP32: 18.9 MB)"}
# The tools that make small files, by their name in the tables.
NAMES = {
    "pared": "pared, 8 bits",
    "pared-small": "pared, size given",
    "bf16": "bfloat16",
    "openvino-w8": "OpenVINO int8 weights",
    "openvino-w4": "OpenVINO int4 weights",
    "openvino-int8": "OpenVINO int8",
    "ort-dynamic": "ONNX Runtime dynamic",
    "ort-static": "ONNX Runtime static",
    "inc2-dynamic": "Intel NC dynamic",
    "torchao-weight": "torchao int8",
    "quanto-w4": "quanto int4",
}
WIDTH, HEIGHT = 440, 360  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 40, 50
LETTER, LINE = 6.1, 13  # about what a letter takes across and a line takes down, at 11 pixels
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Where a name may stand beside its point: the first place that is free is taken.
PLACES = [(x, y, side) for y in (4, -11, 19, -23, 31, -35) for x, side in ((9, "start"), (-9, "end"), (0, "middle"))]


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


def points(text: str, panel: Panel) -> dict[str, tuple[float, float]]:
    """Megabytes and loss of each tool that `NAMES` has and that gave a result."""
    lines = text.split(f"| {panel.model} | ")[1].split("\n\n")[0].splitlines()
    columns = [cell.strip() for cell in lines[0].strip("| ").split("|")]
    loss, found = columns.index(panel.column) + 1, {}  # the table's first column is its title, which was cut off
    for line in lines[2:]:
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if cells[0] in NAMES and cells[loss] != "-":
            found[cells[0]] = (float(cells[1].split()[0]), float(cells[loss]))
    return found


def _panel(panel: Panel, found: dict[str, tuple[float, float]], theme: Theme) -> Iterable[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(megabytes: float) -> float:
        low, high = map(math.log, panel.megabytes)
        return round(LEFT + (right - LEFT) * (math.log(megabytes) - low) / (high - low), 1)

    def up(loss: float) -> float:
        low, high = map(math.log, panel.losses)
        return round(bottom - (bottom - TOP) * (math.log(loss) - low) / (high - low), 1)

    yield _text(LEFT, 22, TITLES[panel.model], theme.ink, "start", "font-size='14' font-weight='600'")
    for power in range(math.ceil(math.log10(panel.losses[0])), math.floor(math.log10(panel.losses[1])) + 1):
        height = up(10.0**power)
        yield f"<line x1='{LEFT}' x2='{right}' y1='{height}' y2='{height}' stroke='{theme.line}'/>"
        yield _text(LEFT - 8, height + 4, f"10{str(power).translate(RAISED)}" if power else "1", theme.soft, "end")
    for tick in panel.ticks:
        x = across(tick)
        yield f"<line x1='{x}' x2='{x}' y1='{TOP}' y2='{bottom}' stroke='{theme.line}'/>"
        yield _text(x, bottom + 17, f"{tick:g}", theme.soft)
    yield _text((LEFT + right) / 2, HEIGHT - 12, "size of the file, MB", theme.soft)
    yield _text(LEFT + 8, bottom - 8, "↙ better", theme.soft, "start")
    middle = (TOP + bottom) / 2
    yield f"<g transform='rotate(-90 14 {middle})'>{_text(14, middle, panel.loss, theme.soft)}</g>"
    places = {name: (across(x), up(y)) for name, (x, y) in found.items()}
    ours = [places[name] for name in ("pared-small", "pared")]
    yield f"<polyline points='{_path(ours)}' fill='none' stroke='{theme.ours}' stroke-width='2' opacity='0.5'/>"
    for name, (x, y) in places.items():
        color, radius = (theme.ours, 6) if name.startswith("pared") else (theme.others, 4)
        yield f"<circle cx='{x}' cy='{y}' r='{radius}' fill='{color}'/>"
    yield from _labels(places, right, theme)


def _labels(places: dict[str, tuple[float, float]], right: float, theme: Theme) -> Iterable[str]:
    """Put a name beside each point, where it covers neither a point nor another name."""
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places.values()]
    for name, (x, y) in sorted(places.items(), key=lambda place: (not place[0].startswith("pared"), place[1])):
        words = NAMES[name]
        for dx, dy, side in PLACES:
            start = x + dx - len(words) * LETTER * {"start": 0, "middle": 0.5, "end": 1}[side]
            box = (start, y + dy - LINE + 3, start + len(words) * LETTER, y + dy + 3)
            if box[0] > LEFT and box[2] < right + RIGHT and not any(_meet(box, other) for other in taken):
                taken.append(box)
                bold = "font-weight='600'" if name.startswith("pared") else ""
                yield _text(x + dx, y + dy, words, theme.ours if bold else theme.ink, side, bold)
                break


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _path(corners: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in corners)


def _text(x: float, y: float, words: str, color: str, anchor: str = "middle", more: str = "") -> str:
    return f"<text x='{x}' y='{y}' text-anchor='{anchor}' fill='{color}' {more}>{escape(words)}</text>"


def picture(text: str, theme: Theme) -> str:
    """The panels side by side, from the page of results."""
    panels = (
        f"<g transform='translate({WIDTH * i} 0)'>{''.join(_panel(panel, points(text, panel), theme))}</g>"
        for i, panel in enumerate(PANELS)
    )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH * len(PANELS)} {HEIGHT}' role='img' "
        f"font-family='system-ui, sans-serif' font-size='11'><title>Size against loss</title>{''.join(panels)}</svg>\n"
    )


def draw() -> None:
    text = RESULTS.read_text(encoding="utf-8")
    for name, theme in THEMES.items():
        (PICTURES / f"size-loss-{name}.svg").write_text(picture(text, theme), encoding="utf-8")


if __name__ == "__main__":
    draw()
