"""The trade-off curve: bytes against damage and score for several damages; as a table, as JSON, and as a picture."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final
from xml.sax.saxutils import escape

from torch import nn

from pared import model as quantized
from pared.errors import ConfigError
from pared.evaluate import evaluate
from pared.reporting import Outcome
from pared.search import Judge, Workshop

log = logging.getLogger(__name__)

# From where nobody can tell the models apart to where most are of no more use.
SPAN: Final = (1e-5, 0.1)


@dataclass(frozen=True)
class Point:
    """One model of the curve.

    Args:
        price: the damage per byte at which its plan is optimal.
        damage: predicted: the expected share of the output's energy that is lost.
        nbytes: of `best_model.pt`: planned; of the file itself where the model was built for its score.
        score: None where nothing was evaluated.
        seconds: of building and evaluating.
    """

    price: float
    damage: float
    nbytes: int
    score: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Curve:
    """Points from the largest file to the smallest.

    Args:
        points: at least one.
        baseline: the score of the float model; None where nothing was evaluated.

    >>> print(Curve((Point(1e-9, 1e-4, 2_000_000), Point(1e-8, 1e-3, 1_500_000))))
             bytes     damage     damage/byte        score    seconds
         2,000,000     0.0001           1e-09                     0.0
         1,500,000      0.001           1e-08                     0.0
    """

    points: tuple[Point, ...]
    baseline: float | None = None

    def __str__(self) -> str:
        """A table, a line per point."""
        found = [f"{'bytes':>14} {'damage':>10} {'damage/byte':>15} {'score':>12} {'seconds':>10}"]
        for point in self.points:
            score = "" if point.score is None else f"{point.score:.6g}"
            found.append(
                f"{point.nbytes:>14,} {point.damage:>10.3g} {point.price:>15.3g} {score:>12} {point.seconds:>10.1f}"
            )
        if self.baseline is not None:
            found.append(f"{'float model':>14} {'0':>10} {'':>15} {self.baseline:>12.6g}")
        return "\n".join(found)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `json.dumps`."""
        return {"baseline": self.baseline, "points": [asdict(point) for point in self.points]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Curve:
        """The inverse of `to_json`.

        >>> curve = Curve((Point(1e-9, 1e-4, 2_000_000, 0.5),), 0.6)
        >>> Curve.from_json(curve.to_json()) == curve
        True
        """
        return cls(tuple(Point(**point) for point in data["points"]), data["baseline"])

    def scored(self, outcome: Outcome) -> Curve:
        """With the models that a search has scored."""
        trials = [Point(t.price, t.damage, t.nbytes, t.score, t.seconds) for t in outcome.trials]
        return Curve(tuple(sorted((*self.points, *trials), key=lambda point: -point.nbytes)), outcome.baseline)

    def to_svg(self) -> str:
        """A picture: damage, and score where there is one, against bytes; bytes and damage on log scales."""
        panels = [_Panel("damage", [(p.nbytes, p.damage) for p in self.points], log=True)]
        scores = [(p.nbytes, p.score) for p in self.points if p.score is not None]
        if scores:
            panels.append(_Panel("score", scores, level=self.baseline))
        width = len(panels) * _WIDTH
        drawn = "".join(f'<g transform="translate({i * _WIDTH} 0)">{p.draw()}</g>' for i, p in enumerate(panels))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" width="{width}" '
            f'height="{_HEIGHT}" font-family="sans-serif" font-size="12">'
            f'<rect width="{width}" height="{_HEIGHT}" fill="white"/>{drawn}</svg>\n'
        )


def trace(
    workshop: Workshop[nn.Module],
    original: nn.Module,
    judge: Judge | None = None,
    *,
    points: int = 8,
    span: tuple[float, float] = SPAN,
) -> Curve:
    """Follow the trade-off between bytes and damage.

    Args:
        workshop: makes the models, all from one set of statistics.
        original: the float model, in eval mode; scored once.
        judge: whose `eval_func` scores each model; None: nothing is built, and bytes are planned ones.
        points: how many, evenly spaced in log damage; fewer if the workshop has no more different plans.
        span: the least and the most damage, as far as the workshop offers them.

    Returns:
        the curve. Ctrl-C ends it with the points so far.

    Raises:
        ConfigError: no points, or a span that is none.
        EvaluationError: `eval_func` raised, or gave no score.
    """
    if points < 1 or not 0 < span[0] <= span[1]:
        raise ConfigError(
            f"{points} points between damages {span[0]:g} and {span[1]:g} make no curve",
            where="curve",
            remedy="Ask for one point at least, and for 0 < least <= most.",
        )
    baseline = evaluate(judge.eval_func, original).value if judge is not None else None
    low, high = (math.log(min(max(damage, workshop.least), workshop.most)) for damage in span)
    wanted = [math.exp(low + (high - low) * i / max(1, points - 1)) for i in range(points)]
    offers = {workshop.offer(min(max(damage, workshop.least), workshop.most)): None for damage in wanted}
    found: list[Point] = []
    try:
        for offer in offers:
            began = time.monotonic()
            nbytes, score = offer.nbytes, None
            if judge is not None:
                model = workshop.build(offer)
                nbytes, score = quantized.nbytes(model), evaluate(judge.eval_func, model).value
            found.append(Point(offer.price, offer.damage, nbytes, score, time.monotonic() - began))
            log.info("point %d: %s", len(found), found[-1])
    except KeyboardInterrupt:
        if not found:
            raise
        log.warning("interrupted: the curve has %d points", len(found))
    return Curve(tuple(found), baseline)


# The picture, in pixels: a panel, and its margins to the left, right, top and bottom.
_WIDTH: Final = 480
_HEIGHT: Final = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 20, 48
_INK, _GREY, _LINE = "#222222", "#dddddd", "#1f6fb4"
# Which multiples of powers of ten are named on a log axis: the first of these rows that gives few enough.
_DIGITS: Final = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8), (1, 2, 5), (1,))
_MOST_TICKS: Final = 7


@dataclass(frozen=True)
class _Axis:
    """Where a value lies between two ends, and which values are named."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float], *, log: bool) -> _Axis:
        """From the least to the greatest value, with a little room."""
        low, high = min(values), max(values)
        if log:
            return cls(low / 1.15, high * 1.15, log)
        room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - room, high + room, log)

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values inside the range, seven or so."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in _DIGITS:
                found = [float(f"{digit}e{power}") for power in decades for digit in digits]
                inside = [value for value in found if self.low <= value <= self.high]
                if len(inside) <= _MOST_TICKS:
                    break
            return inside
        power = math.floor(math.log10((self.high - self.low) / 3))
        step = next(s for s in (1, 2, 5, 10) if (self.high - self.low) / (s * 10.0**power) <= 6) * 10.0**power
        return [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


@dataclass(frozen=True)
class _Panel:
    """One line of points over bytes, and a dashed level."""

    title: str
    points: Sequence[tuple[float, float]]
    log: bool = False
    level: float | None = None

    def draw(self) -> str:
        """The panel as SVG, its upper left corner at the origin."""
        across = _Axis.of([x for x, _ in self.points], log=True)
        levels = [] if self.level is None else [self.level]
        up = _Axis.of([y for _, y in self.points] + levels, log=self.log)
        inner = (_WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)

        def x(value: float) -> float:
            return round(_LEFT + inner[0] * across.place(value), 1)

        def y(value: float) -> float:
            return round(_TOP + inner[1] * (1 - up.place(value)), 1)

        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        drawn = [_line(x(tick), _TOP, x(tick), bottom, _GREY) for tick in across.ticks()]
        drawn += [_line(_LEFT, y(tick), right, y(tick), _GREY) for tick in up.ticks()]
        drawn += [_text(x(tick), bottom + 17, _bytes(tick)) for tick in across.ticks()]
        drawn += [_text(_LEFT - 7, y(tick) + 4, f"{tick:.6g}", "end") for tick in up.ticks()]
        drawn += [_line(_LEFT, bottom, right, bottom, _INK), _line(_LEFT, _TOP, _LEFT, bottom, _INK)]
        drawn += [_line(_LEFT, y(level), right, y(level), _INK, ' stroke-dasharray="5 4"') for level in levels]
        drawn += [_text(_LEFT + 4, y(level) - 5, "float model", "start") for level in levels]
        corners = " ".join(f"{x(a)},{y(b)}" for a, b in self.points)
        drawn.append(f'<polyline points="{corners}" fill="none" stroke="{_LINE}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x(a)}" cy="{y(b)}" r="3.5" fill="{_LINE}"/>' for a, b in self.points]
        middle = (_TOP + bottom) / 2
        drawn.append(_text((_LEFT + right) / 2, _HEIGHT - 10, "bytes of best_model.pt"))
        drawn.append(f'<g transform="rotate(-90 14 {middle})">{_text(14, middle, self.title)}</g>')
        return "".join(drawn)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}"{more}/>'


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{_INK}">{escape(words)}</text>'


_UNITS: Final[Sequence[tuple[float, str]]] = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def _bytes(value: float) -> str:
    unit, name = next((one for one in _UNITS if value >= one[0]), (1.0, "B"))
    return f"{value / unit:g} {name}"
