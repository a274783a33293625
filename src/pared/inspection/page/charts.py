"""The charts of a report, drawn from plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from pared.artifact.outcome import Point
from pared.inspection.page.drawing import Picture, Sheet, axes, bytes_in_words, colour, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH: Final = 960  # pixels
_NO_DAMAGE: Final = 1e-12  # anything less counts as none, as it does in tables
_DAMAGE: Final = "damage (share of the output's energy)"
MOST_BARS: Final = 40  # layers in a chart with a line for each
_LINE: Final = 20  # pixels for each layer
_MOST_LETTERS: Final = 44  # characters of a name beside an axis

# Families of formats: their names, and their markers, so that nobody has to tell colours apart.
FAMILIES: Final[Mapping[str, tuple[str, str]]] = {
    "codes": ("codes of 8 bits or less", "o"),
    "wide-codes": ("codes of 16 bits", "s"),
    "half": ("floats of 16 bits or less", "^"),
    "float": ("floats of 32 bits or more", "D"),
    "other": ("other numbers", "v"),
    "rest": ("everything else: index, container, padding", "P"),
}
KERNELS: Final[Mapping[str, tuple[str, str]]] = {
    "float32": ("float", "D"),
    "bfloat16": ("half", "^"),
    "int8": ("codes", "o"),
}


def trade_off(points: Sequence[Point], baseline: float | None, chosen: Point | None = None) -> Picture:
    """Damage against bytes, and the score against bytes if there are scores.

    Args:
        points: the models, at least one.
        baseline: the score of the float model; None if there are no scores.
        chosen: the point to mark: the model that was returned.
    """
    scored = [point for point in points if point.score is not None]
    panels = 2 if scored else 1
    with sheet("trade-off", WIDTH, 340) as page:
        first = axes(page.figure, 1, panels, 1)
        by_size = sorted(points, key=lambda point: -point.nbytes)
        first.plot(
            [p.nbytes for p in by_size], [_height(p, "damage") for p in by_size], color=colour("muted"), linewidth=1.4
        )
        _marks(page, first, [point for point in by_size if point.score is None], "damage", "planned")
        _marks(page, first, scored, "damage", "tried")
        first.set(xscale="log", yscale="log", ylabel=_DAMAGE)
        if scored:
            second = axes(page.figure, 1, panels, 2)
            _marks(page, second, scored, "score", "tried")
            if baseline is not None:
                second.axhline(baseline, color=colour("ink"), linestyle=(0, (4, 3)), linewidth=1, label="float model")
            second.set(xscale="log", ylabel="score")
        for one, quantity in zip(page.figure.axes, ("damage", "score"), strict=False):
            if chosen is not None and getattr(chosen, quantity) is not None:
                _ring(one, chosen.nbytes, _height(chosen, quantity))
            _bytes_across(one, "bytes of the file")
            _plain_powers(one)
            one.legend(loc="best")
        return page.picture(_trade_off_in_words(by_size, chosen))


def _height(point: Point, quantity: str) -> float:
    """The height of a point: a damage of 0 is raised a little, because a log scale cannot show it."""
    value: float = getattr(point, quantity)
    return max(value, _NO_DAMAGE) if quantity == "damage" else value


def _ring(panel: Axes, x: float, y: float) -> None:
    """A circle around the model that was returned."""
    style: dict[str, Any] = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgewidth": 2.2}
    panel.plot([x], [y], color=colour("float"), linestyle="none", label="chosen", **style)


def _marks(
    page: Sheet, panel: Axes, points: Sequence[Point], quantity: str, label: Literal["planned", "tried"]
) -> None:
    if not points:
        return
    values = [getattr(point, quantity) for point in points]
    style: dict[str, Any] = {"linestyle": "none", "clip_on": False, "color": colour("muted"), "marker": "o"}
    if label == "tried":
        style |= {"color": colour("codes"), "marker": "s", "markersize": 7}
    heights = [_height(point, quantity) for point in points]
    (drawn,) = panel.plot([point.nbytes for point in points], heights, label=label, **style)
    page.name(drawn, [f"{p.nbytes:,} bytes, {quantity} {v:.4g}" for p, v in zip(points, values, strict=True)])


def _trade_off_in_words(points: Sequence[Point], chosen: Point | None) -> str:
    most, least = points[0], points[-1]
    text = (
        f"Damage against bytes for {len(points)} models, from {bytes_in_words(most.nbytes)} at a damage of "
        f"{most.damage:.2g} to {bytes_in_words(least.nbytes)} at {least.damage:.2g}"
    )
    return text if chosen is None else f"{text}; chosen: {bytes_in_words(chosen.nbytes)} at {chosen.damage:.2g}"


def formats(totals: Sequence[tuple[str, str, int]]) -> Picture:
    """The bytes of each format as bars.

    Args:
        totals: the name, the family and the bytes of each format, the largest first; at least one.
    """
    with sheet("formats", WIDTH, 56 + 26 * len(totals)) as page:
        panel = axes(page.figure)
        whole = max(1, sum(nbytes for _, _, nbytes in totals))
        for place, (name, family, nbytes) in enumerate(totals):
            (bar,) = panel.barh([place], [nbytes], height=0.7, color=colour(family))
            words = f"{bytes_in_words(nbytes)}, {100 * nbytes / whole:.1f} %"
            page.name(bar, f"{name}: {nbytes:,} bytes")
            panel.annotate(words, (nbytes, place), (6, 0), textcoords="offset points", va="center")
        panel.set_xlim(0, max(1, *(nbytes for _, _, nbytes in totals)) * 1.18)
        _names_beside(panel, [name for name, _, _ in totals])
        _bytes_across(panel, "")
        listed = "; ".join(f"{name} {bytes_in_words(nbytes)}" for name, _, nbytes in totals[:6])
        return page.picture(f"Bytes by format: {listed}")


def damages(tensors: Sequence[tuple[str, str, int, float]]) -> Picture:
    """Each tensor's damage against its bytes.

    Args:
        tensors: the name, the family, the bytes and the damage of each, the last two greater than 0.
    """
    with sheet("damages", WIDTH, 380) as page:
        panel = axes(page.figure)
        for family, (words, marker) in FAMILIES.items():
            group = [(name, nbytes, damage) for name, kind, nbytes, damage in tensors if kind == family]
            if group:
                _, sizes, heights = zip(*group, strict=True)
                style: dict[str, Any] = {"marker": marker, "markersize": 6, "alpha": 0.75, "markeredgewidth": 0}
                style |= {"linestyle": "none", "clip_on": False}
                (drawn,) = panel.plot(sizes, heights, color=colour(family), label=words, **style)
                page.name(drawn, [f"{name}: {n:,} bytes, damage {damage:.2g}" for name, n, damage in group])
        panel.set(xscale="log", yscale="log", ylabel=_DAMAGE)
        _bytes_across(panel, "bytes of the tensor in the file")
        _plain_powers(panel)
        panel.legend(loc="best")
        name, _, _, damage = max(tensors, key=lambda tensor: tensor[3])
        return page.picture(
            f"Damage against bytes for {len(tensors):,} tensors; the largest damage, {damage:.2g}, is that of {name}"
        )


def ranges(layers: Sequence[tuple[str, float, float]]) -> Picture:
    """The range of each layer's input, on a scale that is linear around 0 and logarithmic beyond.

    Args:
        layers: the name, the lowest and the highest input of each; at most `MOST_BARS`.
    """
    with sheet("ranges", WIDTH, 70 + _LINE * len(layers)) as page:
        panel = axes(page.figure)
        for place, (name, low, high) in enumerate(layers):
            (drawn,) = panel.plot([low, high], [place, place], color=colour("codes"), linewidth=6, clip_on=False)
            page.name(drawn, f"{name}: from {low:.4g} to {high:.4g}")
        panel.axvline(0, color=colour("muted"), linewidth=1)
        panel.set_xscale("symlog", linthresh=1)
        panel.set_xlabel("input, as seen in calibration")
        _plain_numbers(panel)
        _names_beside(panel, [name for name, _, _ in layers])
        return page.picture(f"Ranges of the inputs of {len(layers)} layers, widest: {layers[0][0]}")


def timings(layers: Sequence[tuple[str, str, Mapping[str, float]]]) -> Picture:
    """Milliseconds of each layer with each kernel; the one that runs is filled.

    Args:
        layers: the name of each, the kernel that runs, and the milliseconds by kernel; at most `MOST_BARS`.
    """
    with sheet("timings", WIDTH, 96 + _LINE * len(layers)) as page:
        panel = axes(page.figure)
        for place, (_, _, times) in enumerate(layers):
            panel.plot([min(times.values()), max(times.values())], [place, place], color=colour("grid"), linewidth=3)
        for kernel, (ink, marker) in KERNELS.items():
            for runs in (True, False):
                marks = [(t[kernel], i, name) for i, (name, k, t) in enumerate(layers) if (k == kernel) == runs]
                times_of, places, _ = zip(*marks, strict=True) if marks else ((), (), ())
                style: dict[str, Any] = {"linestyle": "none", "clip_on": False, "marker": marker, "markersize": 8}
                style["markerfacecolor"] = colour(ink if runs else "surface")
                label = kernel if runs else None
                (drawn,) = panel.plot(times_of, places, color=colour(ink), label=label, **style)
                page.name(drawn, [f"{name}: {ms:.3g} ms in {kernel}" for ms, _, name in marks])
        panel.set(xscale="log", xlabel="milliseconds; the filled mark is what runs")
        _plain_numbers(panel)
        page.figure.legend(loc="outside upper center", ncols=3)
        _names_beside(panel, [name for name, _, _ in layers])
        return page.picture(f"Milliseconds of {len(layers)} layers by kernel, slowest in float32: {layers[0][0]}")


def _names_beside(panel: Axes, names: Sequence[str]) -> None:
    """A line for each name, the first at the top."""
    panel.set_yticks(range(len(names)), [shortened(name, _MOST_LETTERS) for name in names])
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.grid(visible=False, axis="y")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)


def shortened(name: str, most: int) -> str:
    """A name of at most that many characters, with its middle left out if it is longer.

    >>> shortened("encoder.layer.0.attention", 12)
    'enco…tention'
    """
    return name if len(name) <= most else f"{name[: most // 3]}…{name[len(name) - (most - most // 3 - 1) :]}"


def _bytes_across(panel: Axes, label: str) -> None:
    panel.set_xlabel(label)
    _tick_words(panel, bytes_in_words)


def _plain_numbers(panel: Axes) -> None:
    _tick_words(panel, lambda value: f"{value:g}")


def _plain_powers(panel: Axes) -> None:
    """Label the powers of ten on a vertical log scale as the tables write them."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    if panel.get_yscale() == "log":
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"1e{math.log10(value):.0f}"))
        panel.yaxis.set_minor_locator(NullLocator())


# The multiples of powers of ten that are labelled, on a log axis with fewer decades than the first number.
_DIGITS: Final[Sequence[tuple[float, Sequence[float]]]] = (
    (1, (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8)),
    (3, (1, 2, 5)),
    (math.inf, (1,)),
)


def _tick_words(panel: Axes, words: Callable[[float], str]) -> None:
    """Label round values; on a short log scale, some of those between powers of ten too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = panel.xaxis
    if panel.get_xscale() == "log":
        low, high = panel.get_xlim()
        decades = math.log10(high / low)
        digits = next(digits for most, digits in _DIGITS if decades < most)
        axis.set_major_locator(LogLocator(subs=digits, numticks=12))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
