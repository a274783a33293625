"""The report as one HTML page. It fetches nothing, and all text from files is escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Final

from pared.errors import printable
from pared.files.disk import as_path, write_atomic
from pared.inspection.ledger import Row, damage_text, shape_text
from pared.inspection.page import charts
from pared.inspection.page.data import FLOATS, PageData, family_of, tiles
from pared.inspection.page.drawing import Picture, bytes_in_words, require_library
from pared.inspection.page.treemap import SIDES, Tile
from pared.inspection.page.treemap import draw as draw_treemap

REPORT: Final = "report.html"  # its name beside an artifact
_MOST_ROWS: Final = 5_000  # of the table: as many as a browser shows without delay
_MOST_TEXT: Final = 300  # characters in a cell of the table
_ONE_LINE: Final = 36  # characters of a name that fit on one line
_MOST_MODULES: Final = 12  # in the list of the largest ones


def write(data: PageData, path: str | Path) -> None:
    """Write the page, atomically; its directory is made if it is missing.

    Raises:
        ConfigError: the drawing libraries are not installed.
        FileError: the file cannot be written.
    """
    text = render(data).encode()
    write_atomic(as_path(path, "report"), lambda file: file.write(text))


def render(data: PageData) -> str:
    """The page as HTML; the same data always give the same text.

    Raises:
        ConfigError: the drawing libraries are not installed.
    """
    require_library()
    import jinja2
    from markupsafe import Markup

    files = resources.files("pared.inspection.page") / "template"
    texts = {name: (files / name).read_text(encoding="utf-8") for name in ("page.html", "style.css", "script.js")}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    digest = base64.b64encode(hashlib.sha256(texts["script.js"].encode()).digest()).decode()
    page = environment.from_string(texts["page.html"])
    return page.render(
        **_content(data),
        svg=lambda picture: Markup(picture.inline()),  # an XML library wrote it, with its escapes
        breakable=lambda name: _breakable(Markup("{}").format(name)),
        style=Markup(texts["style.css"]),  # our own file
        script=Markup(texts["script.js"]),  # our own file
        script_hash=f"sha256-{digest}",
    )


def _breakable(name: Any) -> Any:
    """A long name with optional line breaks after its dots; a short one unchanged, which makes a smaller page."""
    from markupsafe import Markup

    return name if len(name) <= _ONE_LINE else name.replace(".", Markup(".<wbr>"))


def _content(data: PageData) -> dict[str, Any]:
    """The variables of the template: texts and pictures by section; None for a section without data."""
    ledger = data.ledger
    return {
        "file": _text(ledger.file),
        "words": bytes_in_words,
        "text": _text,
        "ledger": ledger,
        "fitted": data.fitted,
        "outcome": data.outcome,
        # Of the chosen model, in the unit of the tolerable loss.
        "loss": next((trial.loss for trial in data.outcome.trials if trial.nbytes == ledger.nbytes), None),
        "summary": _summary(data),
        "findings": ledger.findings,
        "names": _names,
        "maps": _maps(data),
        "formats": _formats(data),
        "curve": _curve(data),
        "points": data.curve.points if data.curve is not None else (),
        "trials": data.outcome.trials,
        "damage": _damages(data),
        "table": _table(data),
        "ranges": _ranges(data),
        "times": _times(data),
        "provenance": [(_text(str(k)), _text(_plain(v))) for k, v in sorted(data.provenance.items())],
        "absent": list(_absent(data)),
        "families": {name: words for name, (words, _) in charts.FAMILIES.items()},
    }


def _text(text: str) -> str:
    """Text from a file for a cell: control characters escaped, and not too long."""
    text = printable(text[: _MOST_TEXT + 1])
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(_text(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5:,} more"


def _summary(data: PageData) -> str:
    """The result in a sentence, for the top of the page and for link previews."""
    ledger = data.ledger
    if not ledger.original_nbytes:
        tensors = sum(row.shape is not None for row in ledger.rows)
        found = f"; findings: {len(ledger.findings)}" if ledger.findings else ""
        return f"{bytes_in_words(ledger.nbytes)}, tensors: {tensors:,}{found}."
    factor = ledger.original_nbytes / max(1, ledger.nbytes)
    size = f"{factor:.1f} times smaller" if factor >= 1 else f"{1 / factor:.1f} times larger"
    return f"{bytes_in_words(ledger.original_nbytes)} became {bytes_in_words(ledger.nbytes)}: {size}."


@dataclass(frozen=True)
class _Maps:
    """One or two treemaps, each with its title and its width as a share of the page; the largest modules; a legend."""

    pictures: tuple[tuple[str, Picture, float], ...]
    modules: tuple[tuple[str, tuple[int, ...]], ...]
    families: tuple[str, ...]


def _maps(data: PageData) -> _Maps | None:
    ledger = data.ledger
    found = tiles(ledger)
    totals = [sum(sizes) for sizes in zip(*(tile.sizes for tile in found), strict=True)]
    if not max(totals, default=0):
        return None
    scale = SIDES[0] * SIDES[1] / max(totals)
    titles = ("before", "after") if len(totals) == 2 else ("bytes",)
    pictures = tuple(
        (
            f"{title}: {bytes_in_words(total)}",
            draw_treemap(f"map-{title}", found, which, scale, f"Bytes by module, {title}: {bytes_in_words(total)}"),
            math.sqrt(total / max(totals)),
        )
        for which, (title, total) in enumerate(zip(titles, totals, strict=True))
        if total
    )
    shown = {name for tile in found for name, size in zip(tile.families, tile.sizes, strict=True) if size}
    return _Maps(pictures, tuple(_modules(found)), tuple(name for name in charts.FAMILIES if name in shown))


def _modules(found: Sequence[Tile]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The largest modules at the depth where the tree first has three branches; the others together."""
    depth, most = 1, max(len(tile.path) for tile in found)
    while depth < most and len({tile.path[:depth] for tile in found if tile.families[-1] != "rest"}) < 3:
        depth += 1
    groups: dict[str, list[tuple[int, ...]]] = {}
    for tile in found:
        groups.setdefault(".".join(tile.path[:depth]), []).append(tile.sizes)
    totals = [(name, tuple(map(sum, zip(*sizes, strict=True)))) for name, sizes in groups.items()]
    totals.sort(key=lambda item: tuple(-size for size in item[1]))
    yield from ((_text(name), sizes) for name, sizes in totals[:_MOST_MODULES])
    rest = totals[_MOST_MODULES:]
    if rest:
        yield f"{len(rest):,} others", tuple(map(sum, zip(*(sizes for _, sizes in rest), strict=True)))


def _formats(data: PageData) -> Picture | None:
    totals: dict[tuple[str, str], int] = {}
    for row in data.ledger.rows:
        key = (_text(row.format), family_of(row))
        totals[key] = totals.get(key, 0) + row.nbytes
    found = sorted(((*key, nbytes) for key, nbytes in totals.items() if nbytes), key=lambda total: -total[2])
    return charts.formats(found[:20]) if found else None


def _curve(data: PageData) -> Picture | None:
    if data.curve is None or not data.curve.points:
        return None
    return charts.trade_off(data.curve.points, data.curve.baseline, data.chosen)


def _damages(data: PageData) -> Picture | None:
    found = [
        (_text(row.name), family_of(row), row.nbytes, damage)
        for row in data.ledger.rows
        if row.nbytes and (damage := data.damages.get(row.name, 0.0)) > 0
    ]
    return charts.damages(found) if found else None


def _ranges(data: PageData) -> tuple[Picture, str] | None:
    widest = sorted(data.ranges.items(), key=lambda item: item[1][0] - item[1][1])
    shown = [(_text(name), low, high) for name, (low, high) in widest[: charts.MOST_BARS]]
    return (charts.ranges(shown), _partly(len(shown), len(widest), "widest")) if widest else None


def _times(data: PageData) -> tuple[Picture, str] | None:
    slowest = sorted(data.times.items(), key=lambda item: -item[1]["float32"])
    shown = [(_text(name), data.running[name], times) for name, times in slowest[: charts.MOST_BARS]]
    return (charts.timings(shown), _partly(len(shown), len(slowest), "slowest")) if slowest else None


def _partly(shown: int, all_of_them: int, which: str) -> str:
    return f"The {shown} {which} of {all_of_them:,}; the others are in the table." if shown < all_of_them else ""


@dataclass(frozen=True)
class _Column:
    """A column of the table.

    Args:
        title: the heading.
        cell: the text in a row; "" if there is nothing to show.
        about: what the heading means, shown as a tooltip.
        style: the CSS class of its cells.
        width: the width in rem.
        kind: how the page sorts it: as "text", "number", "shape" or "range".
    """

    title: str
    cell: Callable[[PageData, Row], str]
    about: str = ""
    style: str = ""
    width: float = 5.5
    kind: str = "number"


def _damage(data: PageData, row: Row) -> str:
    return damage_text(data.damages.get(row.name))


def _kernel(data: PageData, row: Row) -> str:
    return data.kernels.get(row.name, "")


def _milliseconds(data: PageData, row: Row, kernel: str | None = None) -> str:
    """The time of the layer with a kernel; None: with the one that runs."""
    module = data.module_of(row)
    return f"{data.times[module][kernel or data.running[module]]:.3g}" if module in data.times else ""


def _range(data: PageData, row: Row) -> str:
    module = data.module_of(row)
    return "{:.3g} to {:.3g}".format(*data.ranges[module]) if module in data.ranges else ""


_COLUMNS: Final = (
    _Column("format", lambda _, row: row.format, style="t", width=6.5, kind="text"),
    _Column("shape", lambda _, row: shape_text(row.shape and row.shape[:12]), width=7, kind="shape"),
    _Column("bits", lambda _, row: f"{row.bits:.2f}" if row.elements else "", "bits in the file per number", width=4.2),
    _Column("before", lambda _, row: f"{row.original[1]:,}" if row.original else "", "bytes in the source", width=7.2),
    _Column("bytes", lambda _, row: f"{row.nbytes:,}", "in the file", width=7.2),
    _Column("damage", _damage, "the share of the output's energy that is lost, predicted"),
    _Column("runs", _kernel, "the kernel that runs on this machine", style="t", width=7.2, kind="text"),
    _Column("ms", _milliseconds, "milliseconds of the layer with the kernel that runs", width=4.4),
    _Column("float ms", partial(_milliseconds, kernel="float32"), "milliseconds of the layer in float32"),
    _Column("input", _range, "the range of the layer's input, from calibration", width=9, kind="range"),
    _Column("why", lambda _, row: row.because, style="t y", width=14, kind="text"),
)


@dataclass(frozen=True)
class _Table:
    """The table: of each row its name, whether it was left in float, and its cells.

    Args:
        columns: those that have a text in any row.
        rows: in the order of the ledger.
        left_in_float: the number of rows of floats.
        hidden: the number of the rows that are left out, and their bytes.
    """

    columns: tuple[_Column, ...]
    rows: tuple[tuple[str, bool, tuple[str, ...]], ...]
    left_in_float: int
    hidden: tuple[int, int]

    @property
    def classes(self) -> list[Any]:
        """The `class` attribute of the cells of each column, or nothing."""
        from markupsafe import Markup

        return [Markup(f' class="{column.style}"') if column.style else "" for column in self.columns]  # ours


def _table(data: PageData) -> _Table:
    rows = data.ledger.rows
    shown = rows
    if len(rows) > _MOST_ROWS:
        largest = sorted(range(len(rows)), key=lambda i: -rows[i].nbytes)[:_MOST_ROWS]
        shown = tuple(rows[i] for i in sorted(largest))
    texts = [[_text(column.cell(data, row)) for row in shown] for column in _COLUMNS]
    kept = [i for i, cells in enumerate(texts) if any(cells)]
    cells = list(zip(*(texts[i] for i in kept), strict=True)) if kept else [() for _ in shown]
    floats = [family_of(row) in FLOATS for row in shown]
    return _Table(
        tuple(_COLUMNS[i] for i in kept),
        tuple(zip((_text(row.name) for row in shown), floats, cells, strict=True)),
        sum(floats),
        (len(rows) - len(shown), data.ledger.nbytes - sum(row.nbytes for row in shown)),
    )


def _absent(data: PageData) -> Iterator[str]:
    """The sections without data, each with the reason."""
    if data.ledger.original_nbytes is None:
        yield "bytes before: the file does not say what it was made from"
    if not data.fitted:
        why = "known only after fitting a model, and not stored in files"
        yield f"damage, the trade-off and milliseconds: {why}"
        return
    if data.curve is None:
        yield "the trade-off: the model was made at 8 bits without a search, or loaded; pared.trade_off computes it"
    if not any(data.damages.values()):
        yield "damage: it is predicted from calibration data, and not stored in files"
    if not data.ranges:
        yield "activation ranges: no layer runs in int8 with a calibrated range"
    if not data.times:
        yield "milliseconds: no layer that can run in int8 was timed on this machine"
