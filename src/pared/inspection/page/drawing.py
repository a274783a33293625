"""What all charts share: colours by name, figures of the plotting library, and SVG for a page.

Drawings use placeholder colours, which are replaced by variables of the page's style sheet: one drawing serves both
the light and the dark theme.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pared.errors import ConfigError
from pared.switches import ignoring

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of the light theme by name; the dark theme is in style.css. The colours of the families can be told apart
# without seeing red or green; white text on them, and all text on white, has a contrast of at least 4.5.
LIGHT: Final[Mapping[str, str]] = {
    "ink": "#1b1f24",
    "muted": "#59636e",
    "grid": "#dfe3e8",
    "surface": "#ffffff",
    "on-tile": "#fffffe",
    "accent": "#0a5fa8",
    "codes": "#0b66ad",
    "wide-codes": "#5b4aa0",
    "half": "#00795a",
    "float": "#ad4e16",
    "other": "#a03a74",
    "rest": "#69727d",
}
_PLACEHOLDERS: Final[Mapping[str, str]] = {name: f"#0a0b{number:02x}" for number, name in enumerate(LIGHT, 16)}
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": _PLACEHOLDERS["muted"],
    "axes.labelcolor": _PLACEHOLDERS["ink"],
    "grid.color": _PLACEHOLDERS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": _PLACEHOLDERS["muted"],
    "ytick.color": _PLACEHOLDERS["muted"],
    "xtick.labelcolor": _PLACEHOLDERS["ink"],
    "ytick.labelcolor": _PLACEHOLDERS["ink"],
    "text.color": _PLACEHOLDERS["ink"],
    "legend.frameon": False,
}
_SVG: Final = "http://www.w3.org/2000/svg"
_LINK: Final = "{http://www.w3.org/1999/xlink}href"
_STYLES: Final = (  # what the style sheet sets is removed from styles: font families and line joins
    (r"font: (bold|[67]00) ([\d.]+)px [^;]*", r"font-size: \2px; font-weight: 700"),
    (r"font: ([\d.]+)px [^;]*", r"font-size: \1px"),
    (r"; stroke-(linejoin|linecap): (miter|butt|square|round)", ""),
)
_MOST_TITLE: Final = 200  # characters of a tooltip


def colour(name: str) -> str:
    """The placeholder to draw with for a colour of this name."""
    return _PLACEHOLDERS[name]


_UNITS: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def bytes_in_words(nbytes: float) -> str:
    """Bytes to three significant figures, with a unit.

    >>> [bytes_in_words(n) for n in (0, 999, 10_384_123, 90_900_000, 1_234_000_000_000)]
    ['0 B', '999 B', '10.4 MB', '90.9 MB', '1234 GB']
    """
    for unit, name in _UNITS:
        if nbytes >= 0.9995 * unit:
            value = nbytes / unit
            return f"{value:.0f} {name}" if value >= 999.5 else f"{value:.3g} {name}"
    return f"{nbytes:.0f} B"


def require_library() -> None:
    """Check that charts can be drawn, before the work starts.

    Raises:
        ConfigError: the drawing libraries are not installed.
    """
    try:
        import jinja2  # noqa: F401  # is it installed?
        import matplotlib  # noqa: F401  # is it installed?
        import squarify  # noqa: F401  # is it installed?
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed, and the report cannot be drawn without it",
            where="the report in HTML",
            remedy="Install it with: pip install 'pared[report]'",
        ) from error


@dataclass(frozen=True)
class Picture:
    """A finished drawing: the `svg` element in placeholder colours, and what it shows, in a sentence."""

    root: ET.Element
    label: str

    def inline(self) -> str:
        """The picture for a page, with its label, in the colours of the page's style sheet."""
        text = self._text({"role": "img", "aria-label": self.label})
        for name, placeholder in _PLACEHOLDERS.items():
            text = text.replace(placeholder, f"var(--{name})")
        return text

    def standalone(self) -> str:
        """The picture for a file of its own, on white."""
        size = dict(zip(("width", "height"), self.root.get("viewBox", "").split()[2:], strict=True))
        text = self._text({**size, "font-family": "sans-serif", "style": f"background: {LIGHT['surface']}"})
        for name, placeholder in _PLACEHOLDERS.items():
            text = text.replace(placeholder, LIGHT[name])
        return text + "\n"

    def _text(self, attributes: Mapping[str, str]) -> str:
        ET.register_namespace("", _SVG)
        root = ET.Element(self.root.tag, {**self.root.attrib, **attributes})
        root.extend(self.root)
        return ET.tostring(root, encoding="unicode")


@dataclass(eq=False)
class Sheet:
    """A figure while it is being drawn.

    Args:
        figure: the figure of the plotting library; its unit is the pixel.
        titles: the tooltips by the id of an artist: one text, or one for each of its markers.
        finds: what a click searches for in the table, by the id of an artist.
    """

    figure: Figure
    titles: dict[str, str | Sequence[str]] = field(default_factory=dict)
    finds: dict[str, str] = field(default_factory=dict)

    def name(self, artist: Any, title: str | Sequence[str], find: str | None = None) -> None:
        """Give an artist a tooltip, and what a click on it searches for."""
        gid = f"a{len(self.titles)}"
        artist.set_gid(gid)
        self.titles[gid] = title
        if find is not None:
            self.finds[gid] = find

    def picture(self, label: str) -> Picture:
        """The finished drawing."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        buffer = io.BytesIO()
        # The browser uses its own fonts, so it does not matter which glyphs the library's font lacks.
        with ignoring(UserWarning, "Glyph .* missing from"):
            # savefig would draw everything twice.
            canvas: Any = FigureCanvasSVG(self.figure)  # its method has no types
            canvas.print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date")))
        root = ET.fromstring(buffer.getvalue())
        _tidy(root)
        self._add_titles(root)
        return Picture(root, label)

    def _add_titles(self, root: ET.Element) -> None:
        for element in [element for element in root.iter() if element.get("id") in self.titles]:
            gid = element.attrib.pop("id")
            title = self.titles[gid]
            if gid in self.finds:
                element.set("data-find", self.finds[gid])
            if isinstance(title, str):
                _add_title(element, title)
                continue
            markers = [child for child in element.iter() if child.tag == f"{{{_SVG}}}use"]
            for marker, text in zip(markers, title, strict=True):
                _add_title(marker, text)


@contextmanager
def sheet(name: str, width: float, height: float) -> Iterator[Sheet]:
    """An empty figure of this size in pixels; the same drawing always gives the same bytes.

    The ids in the drawing are made from the name, which is unique within the page.

    Raises:
        ConfigError: the drawing libraries are not installed.
    """
    require_library()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        figure.patch.set_visible(False)
        yield Sheet(figure)


def axes(figure: Figure, *where: Any) -> Axes:
    """Axes without a background."""
    found: Axes = figure.add_subplot(*where)
    found.patch.set_visible(False)
    return found


def _tidy(root: ET.Element) -> None:
    """Remove what a page does not need: sizes, metadata, styles of other elements, unused ids, excess digits."""
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        element.tail = None  # line breaks, which a browser would turn into nodes
        element.text = (element.text or "").strip() or None
        if _LINK in element.attrib:
            element.set("href", element.attrib.pop(_LINK))
        for name in ("d", "points", "transform", "x", "y"):
            if name in element.attrib:
                element.set(name, re.sub(r"-?\d+\.\d{3,}", _short, element.attrib[name]))
        if "style" in element.attrib:
            for pattern, replacement in _STYLES:
                element.set("style", re.sub(pattern, replacement, element.attrib["style"]))
    used = set(re.findall(r"#([\w-]+)", " ".join(v for e in root.iter() for k, v in e.attrib.items() if k != "id")))
    for element in root.iter():
        if element.get("id", "a0") not in used and not re.fullmatch(r"a\d+", element.get("id", "a0")):
            del element.attrib["id"]


def _short(number: re.Match[str]) -> str:
    return f"{float(number.group()):.2f}".rstrip("0").rstrip(".")


def _add_title(element: ET.Element, text: str) -> None:
    title = ET.Element(f"{{{_SVG}}}title")
    title.text = text if len(text) <= _MOST_TITLE else f"{text[:_MOST_TITLE]}…"
    element.insert(0, title)
