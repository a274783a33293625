"""What all charts share: colours by name, figures of the plotting library, and SVG that a page can hold.

Colours are drawn as stand-ins, and become variables of the page's style sheet, so that one drawing serves both themes.
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

# By name: the colour on white; the dark theme is in style.css. Those of the families can be told apart by people who
# do not see red or green, and white text on them, like the text on white, has a contrast of 4.5 at least.
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
_STAND_INS: Final[Mapping[str, str]] = {name: f"#0a0b{number:02x}" for number, name in enumerate(LIGHT, 16)}
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": _STAND_INS["muted"],
    "axes.labelcolor": _STAND_INS["ink"],
    "grid.color": _STAND_INS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": _STAND_INS["muted"],
    "ytick.color": _STAND_INS["muted"],
    "xtick.labelcolor": _STAND_INS["ink"],
    "ytick.labelcolor": _STAND_INS["ink"],
    "text.color": _STAND_INS["ink"],
    "legend.frameon": False,
}
_SVG: Final = "http://www.w3.org/2000/svg"
_LINK: Final = "{http://www.w3.org/1999/xlink}href"
_MOST_TITLE: Final = 200  # characters


def colour(name: str) -> str:
    """What to draw in for a colour's name."""
    return _STAND_INS[name]


_UNITS: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def bytes_in_words(nbytes: float) -> str:
    """Bytes with three figures.

    >>> [bytes_in_words(n) for n in (0, 999, 10_384_123, 90_900_000, 1_234_000_000_000)]
    ['0 B', '999 B', '10.4 MB', '90.9 MB', '1234 GB']
    """
    for unit, name in _UNITS:
        if nbytes >= 0.9995 * unit:
            value = nbytes / unit
            return f"{value:.0f} {name}" if value >= 999.5 else f"{value:.3g} {name}"
    return f"{nbytes:.0f} B"


def require_library() -> None:
    """See that charts can be drawn, before work begins.

    Raises:
        ConfigError: the drawing libraries are not installed.
    """
    try:
        import jinja2  # noqa: F401  # is it there?
        import matplotlib  # noqa: F401  # is it there?
        import squarify  # noqa: F401  # is it there?
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed, which draws the report",
            where="the report in HTML",
            remedy="Install it with: pip install 'pared[report]'",
        ) from error


@dataclass(frozen=True)
class Picture:
    """A finished drawing.

    Args:
        root: the `svg` element, in stand-ins for colours.
        label: what it shows, in a sentence.
    """

    root: ET.Element
    label: str

    def inline(self) -> str:
        """For a page: an image with a label, in the colours of its style sheet."""
        text = self._text({"role": "img", "aria-label": self.label})
        for name, stand_in in _STAND_INS.items():
            text = text.replace(stand_in, f"var(--{name})")
        return text

    def standalone(self) -> str:
        """For a file of its own: on white."""
        size = dict(zip(("width", "height"), self.root.get("viewBox", "").split()[2:], strict=True))
        text = self._text({**size, "font-family": "sans-serif", "style": f"background: {LIGHT['surface']}"})
        for name, stand_in in _STAND_INS.items():
            text = text.replace(stand_in, LIGHT[name])
        return text + "\n"

    def _text(self, attributes: Mapping[str, str]) -> str:
        ET.register_namespace("", _SVG)
        root = ET.Element(self.root.tag, {**self.root.attrib, **attributes})
        root.extend(self.root)
        return ET.tostring(root, encoding="unicode")


@dataclass(eq=False)
class Sheet:
    """A figure while it is drawn.

    Args:
        figure: of the plotting library; its unit is the pixel.
        titles: what is shown where the pointer rests, by the id of an artist: a text, or one for each of its markers.
        finds: what a click searches the table for, by the id of an artist.
    """

    figure: Figure
    titles: dict[str, str | Sequence[str]] = field(default_factory=dict)
    finds: dict[str, str] = field(default_factory=dict)

    def name(self, artist: Any, title: str | Sequence[str], find: str | None = None) -> None:
        """Say what an artist shows."""
        gid = f"a{len(self.titles)}"
        artist.set_gid(gid)
        self.titles[gid] = title
        if find is not None:
            self.finds[gid] = find

    def picture(self, label: str) -> Picture:
        """The finished drawing."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        buffer = io.BytesIO()
        # The browser has fonts of its own: it does not matter what the library's font lacks.
        with ignoring(UserWarning, "Glyph .* missing from"):
            # Not savefig, which draws everything twice.
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
    """An empty figure, and the style for what is drawn on it. The same drawing gives the same bytes.

    Args:
        name: one that no other drawing of the page has: its ids are made from it.
        width: in pixels.
        height: in pixels.

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
    """Leave out what has no place in a page: sizes, metadata, the style of other elements, ids."""
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        element.tail = None  # a new line, of which a browser makes a node
        element.text = (element.text or "").strip() or None
        if _LINK in element.attrib:
            element.set("href", element.attrib.pop(_LINK))
        for name in ("d", "points", "transform", "x", "y"):
            if name in element.attrib:
                element.set(name, re.sub(r"-?\d+\.\d{3,}", _short, element.attrib[name]))
        if "style" in element.attrib:
            element.set("style", _style(element.attrib["style"]))
    used = set(re.findall(r"#([\w-]+)", " ".join(v for e in root.iter() for k, v in e.attrib.items() if k != "id")))
    for element in root.iter():
        if element.get("id", "a0") not in used and not re.fullmatch(r"a\d+", element.get("id", "a0")):
            del element.attrib["id"]


def _short(number: re.Match[str]) -> str:
    return f"{float(number.group()):.2f}".rstrip("0").rstrip(".")


def _style(text: str) -> str:
    """Without what the style sheet says: families of fonts, and how lines meet."""
    text = re.sub(r"font: (?:(bold|[67]00) )?([\d.]+)px [^;]*", lambda m: _font(m.group(1), m.group(2)), text)
    return re.sub(r"; stroke-(linejoin|linecap): (miter|butt|square|round)", "", text)


def _font(weight: str | None, size: str) -> str:
    return f"font-size: {size}px" + ("; font-weight: 700" if weight else "")


def _add_title(element: ET.Element, text: str) -> None:
    title = ET.Element(f"{{{_SVG}}}title")
    title.text = text if len(text) <= _MOST_TITLE else f"{text[:_MOST_TITLE]}…"
    element.insert(0, title)
