"""The report as a page: complete, exact, repeatable, and harmless whatever a file's names are."""

import functools
import html
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import pared
from pared.artifact.index import Entry
from pared.artifact.outcome import Curve, Outcome, Point
from pared.errors import ConfigError, CorruptError
from pared.inspection.ledger import Ledger, Row
from pared.inspection.page import charts, data, page
from pared.inspection.page.drawing import LIGHT, Sheet, sheet
from pared.inspection.page.treemap import SIDES, Tile, lay_out
from tests.inspection.pages import HOSTILE, full

TEMPLATE = Path(page.__file__).with_name("template")
SECTIONS = ["findings", "bytes", "formats", "trade-off", "damage", "times", "ranges", "tensors", "provenance"]


class Document(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def sections(self) -> list[str]:
        return [str(attrs["id"]) for tag, attrs in self.tags if tag == "section" and "id" in attrs]


def fitted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
    conf = pared.PostTrainingQuantConfig(approach="static", quant_level=0)
    return pared.fit(model, conf, [torch.randn(16, 64)], quiet=True)


@pytest.mark.slow
def test_everything_that_is_known_has_its_section() -> None:
    document = Document(page.render(full()))
    assert document.sections() == SECTIONS
    labels = [attrs["aria-label"] for tag, attrs in document.tags if tag == "svg"]
    assert len(labels) == 7
    assert all(labels)
    assert all(attrs.get("role") == "img" for tag, attrs in document.tags if tag == "svg")


@pytest.mark.slow
def test_the_same_data_give_the_same_bytes() -> None:
    assert page.render(full()) == page.render(full())


@pytest.mark.slow
def test_a_quantized_model_writes_its_page(tmp_path: Path) -> None:
    model = fitted()
    target = tmp_path / "new" / "report.html"
    assert model.report(html=target) == model.report()
    text = target.read_text(encoding="utf-8")
    assert pared.report(model, html=str(tmp_path / "again.html"))
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text
    ledger = pared.inspect(model)
    assert f"{ledger.original_nbytes:,}" in text
    assert f"{ledger.nbytes:,}" in text
    document = Document(text)
    assert {"bytes", "formats", "damage", "ranges", "tensors", "provenance"} <= set(document.sections())
    assert "trade-off" not in document.sections()
    assert any("without a search" in words for words in document.texts), "why there is no trade-off"


@pytest.mark.slow
def test_a_file_is_shown_with_what_it_records(tmp_path: Path) -> None:
    model = fitted()
    model.save(tmp_path)
    for path in (tmp_path, tmp_path / "best_model.pt"):
        found = data.of_file(path, pared.inspect(path))
        assert set(found.ranges) == {"0", "2"}
        assert found.provenance["approach"] == "static"
        sections = Document(page.render(found)).sections()
        assert sections == ["bytes", "formats", "ranges", "tensors", "provenance"]


def test_a_bare_file_leaves_out_what_nobody_knows(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(8, 8), "b": torch.zeros(3, dtype=torch.int64)}, tmp_path / "bare.pt")
    text = page.render(data.of_file(tmp_path / "bare.pt", pared.inspect(tmp_path / "bare.pt")))
    document = Document(text)
    assert document.sections() == ["bytes", "formats", "tensors"]
    assert [tag for tag, _ in document.tags].count("svg") == 2
    assert "does not say what it was made from" in text


def test_a_model_without_tensors_has_a_page() -> None:
    text = page.render(data.PageData(Ledger("empty", 0, (), 0)))
    assert Document(text).sections() == ["tensors"]


def test_the_maps_hold_every_byte() -> None:
    found = full(57)
    tiles = data.tiles(found.ledger)
    totals = [sum(tile.sizes[i] for tile in tiles) for i in range(2)]
    assert totals == [found.ledger.original_nbytes, found.ledger.nbytes]
    scale = SIDES[0] * SIDES[1] / totals[0]
    for which, total in enumerate(totals):
        layout = lay_out(tiles, which, scale)
        assert layout.width * layout.height == pytest.approx(total * scale)
        assert sum(tile.sizes[which] for tile, _ in layout.tiles) == total
        for tile, (_, _, width, height) in layout.tiles:
            assert width * height == pytest.approx(tile.sizes[which] * scale, rel=1e-6)


def test_tiles_do_not_overlap_and_stay_in_the_map() -> None:
    tiles = data.tiles(full(57).ledger)
    layout = lay_out(tiles, 1, 1.0)
    boxes = [box for _, box in layout.tiles]
    for i, (x, y, w, h) in enumerate(boxes):
        assert x >= -1e-6
        assert y >= -1e-6
        assert x + w <= layout.width + 1e-6
        assert y + h <= layout.height + 1e-6
        for a, b, c, d in boxes[:i]:
            assert min(x + w, a + c) - max(x, a) < 1e-6 or min(y + h, b + d) - max(y, b) < 1e-6


@pytest.mark.parametrize("count", [1, 2, 299, 300, 301, 3000])
def test_any_number_of_modules_can_be_placed(count: int) -> None:
    tiles = [Tile((f"m{i}",), (count - i,), ("float",), f"m{i}.") for i in range(count)]
    layout = lay_out(tiles, 0, 1.0)
    assert sum(tile.sizes[0] for tile, _ in layout.tiles) == sum(tile.sizes[0] for tile in tiles)


def test_sizes_of_every_order_can_be_placed() -> None:
    tiles = [Tile((f"m{i}",), (2**i,), ("float",), f"m{i}.") for i in range(60)]
    layout = lay_out(tiles, 0, 1e-12)
    assert sum(tile.sizes[0] for tile, _ in layout.tiles) == 2**60 - 1
    assert any("small ones" in tile.name for tile, _ in layout.tiles)


@functools.cache
def plain() -> str:
    """A page without such names."""
    return page.render(full(2))


HOSTILE_NAMES = [
    HOSTILE,
    '" onmouseover="alert(1)',
    "'><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{2",
    "\x00\x1b[31m\x07\ud800\u202e",
    "]]>&amp;&lt;",
    "模型.权重",
    "." * 5000,
    "x" * 100_000,
    "a." * 400 + "weight",
    "",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
@pytest.mark.slow
def test_no_name_is_taken_for_markup(name: str) -> None:
    extra = Row(name, (1000, 1000), name, 1_000_000, name, original=("float32", 4_000_000))
    found = full(2, (extra,))
    finding = replace(found.ledger.findings[0], kind=name, names=(name,) * 9, evidence=name, remedy=name)
    found = replace(
        found,
        ledger=replace(found.ledger, file=name, findings=(finding,)),
        outcome=replace(found.outcome, contributors=((name, 0.5),)),
        kernels={**found.kernels, name: name},
        damages={**found.damages, name: 0.1},
        activations={**found.activations, name: {"mode": "static", "low": -1.0, "high": 1.0}},
        times={**found.times, name: dict.fromkeys(charts.KERNELS, 1.0)},
        running={**found.running, name: "int8"},
        provenance={name: name, "inner": {name: [name]}},
    )
    text = page.render(found)
    document = Document(text)
    assert {tag for tag, _ in document.tags} <= {tag for tag, _ in Document(plain()).tags} | {"code", "wbr"}
    assert [tag for tag, _ in document.tags].count("script") == 1
    assert not [key for _, attrs in document.tags for key in attrs if key.startswith("on")]
    assert "49" not in document.texts
    assert len(text) < len(plain()) + 100_000


@pytest.mark.slow
def test_the_page_fetches_nothing() -> None:
    text = page.render(full())
    document = Document(text)
    for tag, attrs in document.tags:
        for key in ("src", "href", "action", "data", "poster"):
            assert (attrs.get(key) or "#").startswith(("#", "data:")), (tag, attrs)
    assert not re.search(r"@import|url\((?!#)", text)
    policy = next(attrs["content"] for tag, attrs in document.tags if attrs.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "script-src 'sha256-" in policy


@pytest.mark.slow
def test_ids_are_unique_and_references_lead_somewhere() -> None:
    text = page.render(full())
    document = Document(text)
    ids = [attrs["id"] for _, attrs in document.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="#|aria-labelledby="|url\(#)([\w-]+)', text):
        assert target in ids


@pytest.mark.slow
def test_the_largest_rows_of_very_many_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_MOST_ROWS", 10)
    found = full(40)
    document = Document(page.render(found))
    assert [tag for tag, attrs in document.tags if tag == "th" and attrs.get("scope") == "row"].count("th") > 10
    words = " ".join(document.texts)
    shown = sorted((row.nbytes for row in found.ledger.rows), reverse=True)[:10]
    assert f"The largest 10 rows; 72 smaller ones, {found.ledger.nbytes - sum(shown):,} bytes together" in words
    assert "sum to the file" not in words


@pytest.mark.slow
def test_a_row_says_what_was_left_in_float() -> None:
    text = page.render(full(20))
    assert text.count('class="fl"') == sum(row.format.startswith("float") for row in full(20).ledger.rows)


@pytest.mark.parametrize("missing", ["matplotlib", "squarify", "jinja2"])
def test_a_missing_library_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    model = fitted()
    with pytest.raises(ConfigError, match=re.escape(f"{missing} is not installed")) as error:
        model.report(html=tmp_path / "report.html")
    assert "pip install 'pared[report]'" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert model.report()
    model.save(tmp_path)


def test_what_an_artifact_says_of_its_outcome_is_checked() -> None:
    for broken in (
        {"score": HOSTILE},
        {"score": 10**400},
        {"met": 0.5},
        {"confirmation": {"score": [], "baseline": 0.0, "loss": 0.0}},
        {"confirmation": {"score": 1.0, "baseline": None, "loss": 0.0}},
        {"contributors": [1]},
    ):
        with pytest.raises(CorruptError, match="makes no sense"):
            Outcome.from_json(broken)


def colours(theme: str) -> dict[str, str]:
    """The variables of a theme."""
    start = ":root {" if theme == "light" else ':root[data-theme="dark"] {'
    block = (TEMPLATE / "style.css").read_text(encoding="utf-8").split(start)[1].split("}")[0]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))


def luminance(colour: str) -> float:
    """The luminance of an sRGB colour, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(theme: str) -> None:
    found = colours(theme)
    for ink in ("ink", "muted", "accent", "good", "bad"):
        for ground in ("surface", "page", "shade"):
            assert contrast(found[ink], found[ground]) >= 4.5, (ink, ground)
    for family in charts.FAMILIES:
        assert contrast(found["on-tile"], found[family]) >= 4.5, family
        assert contrast(found["surface"], found[family]) >= 3, family


@pytest.mark.parametrize(("codes", "family"), [("int8", "codes"), ("int16", "wide-codes")])
@pytest.mark.parametrize("scaled", [False, True])
def test_scales_of_columns_do_not_change_the_colour_of_codes(codes: str, family: str, scaled: bool) -> None:
    form = {"tag": "grid", "codes": codes, "scaled": scaled}
    entry = Entry(("w",), "parameter", "float32", (4, 4), form, ((4, 4), (0,)), None, "", {})
    assert entry.label.endswith("scaled") == scaled
    assert data.family(entry.label) == family


def test_both_ways_to_the_dark_theme_are_the_same_and_drawings_alone_are_light() -> None:
    style = (TEMPLATE / "style.css").read_text(encoding="utf-8")
    by_media = style.split(':root:not([data-theme="light"]) {')[1].split("}")[0]
    assert dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", by_media)) == colours("dark")
    assert {name: colours("light")[name] for name in LIGHT} == dict(LIGHT)


def test_a_title_belongs_to_each_mark() -> None:
    with sheet("marks", 100, 100) as drawn:
        assert isinstance(drawn, Sheet)
        panel = drawn.figure.add_subplot()
        (line,) = panel.plot([1, 2, 3], [1, 2, 3], marker="o")
        drawn.name(line, ["one", "two", html.escape("<three>")])
        text = drawn.picture("three marks").standalone()
    assert re.findall(r"<title>(.*?)</title>", text) == ["one", "two", "&amp;lt;three&amp;gt;"]


def test_models_without_damage_have_a_place_on_the_curve() -> None:
    points = (Point(1.0, 0.0, 900, 1.0), Point(1.0, 1e-3, 500, 0.9))
    for curve in (Curve(points, 1.0), Curve(points[:1])):
        text = charts.trade_off(curve.points, curve.baseline).standalone()
        assert "900 bytes, damage 0<" in text


def test_the_summary_of_a_file_counts_what_is_there() -> None:
    rows = (Row("w", (1,), "float32", 4), Row("(header)", None, "header", 2))
    assert '<p class="lead">6 B, tensors: 1.</p>' in page.render(data.PageData(Ledger("f", 6, rows, 1)))


@pytest.mark.slow
def test_the_widest_range_is_drawn() -> None:
    widest = float(torch.finfo(torch.float32).max)
    one = {"mode": "static", "low": -widest, "high": widest}
    assert "from -3.403e+38 to 3.403e+38" in page.render(replace(full(), activations={"blocks.0": one}))


@pytest.mark.slow
def test_no_tick_is_named_in_the_language_of_formulas() -> None:
    assert "mathdefault" not in page.render(full())
