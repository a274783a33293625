"""Treemaps of a model's bytes by module; two of them can be drawn at one scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pared.inspection.page.drawing import Picture, bytes_in_words, colour, sheet

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

SIDES: Final = (960, 400)  # of the larger map, in pixels
# Tiles with less than this share of every map are merged with the other small ones of their module.
_LEAST_SHARE: Final = 1 / 2500
_MOST_SEARCHED: Final = 200  # characters of a name that a click searches for
_MOST_PARTS: Final = 300  # rectangles laid out at a time: the library calls itself once for each row of them
_FONT: Final = 11.0
_LETTER: Final = 0.56  # mean width of a letter, as a share of the font size
# The width of lines in pixels: around the outermost modules first, then inwards.
_LINES: Final = (3.0, 1.6, 0.8)


@dataclass(frozen=True)
class Tile:
    """The bytes of one module, or of several small ones.

    Args:
        path: the components of the module's dotted name.
        sizes: the bytes in each map.
        families: the family of formats that most of these bytes are in, in each map.
        start: the beginning of the names of its tensors.
    """

    path: tuple[str, ...]
    sizes: tuple[int, ...]
    families: tuple[str, ...]
    start: str

    @property
    def name(self) -> str:
        """The dotted name."""
        return ".".join(self.path)


@dataclass
class _Node:
    tiles: list[Tile] = field(default_factory=list)
    inner: dict[str, _Node] = field(default_factory=dict)

    def sizes(self) -> tuple[int, ...]:
        parts = [tile.sizes for tile in self.tiles] + [node.sizes() for node in self.inner.values()]
        return tuple(map(sum, zip(*parts, strict=True)))


Box = tuple[float, float, float, float]  # x, y, width, height: in pixels from the upper left corner of the map


@dataclass
class TreemapLayout:
    """The positions of everything in one map, in pixels.

    Args:
        width: the width of the map.
        height: the height of the map.
        tiles: the tiles with their boxes.
        frames: the boxes of modules that contain others, with their depth in the tree, the outermost first.
    """

    width: float
    height: float
    tiles: list[tuple[Tile, Box]] = field(default_factory=list)
    frames: list[tuple[Box, int]] = field(default_factory=list)


def lay_out(tiles: Sequence[Tile], which: int, area_per_byte: float) -> TreemapLayout:
    """Place the tiles of one map: areas are exact, and modules stay together, in the same order in every map.

    Args:
        tiles: the tiles of all maps.
        which: the index of the map.
        area_per_byte: in square pixels; use the same for two maps to make them comparable.
    """
    merged = list(_merged(tiles))
    total = sum(tile.sizes[which] for tile in merged)
    side = math.sqrt(total * area_per_byte / (SIDES[0] * SIDES[1]))
    found = TreemapLayout(SIDES[0] * side, SIDES[1] * side)
    _place(_tree(merged), which, found)
    return found


def _merged(tiles: Sequence[Tile]) -> Iterator[Tile]:
    """The tiles that are large enough to see; the small ones of a module are merged, if need be with those outside."""
    totals = [max(1, sum(sizes)) for sizes in zip(*(tile.sizes for tile in tiles), strict=True)]
    small: dict[tuple[str, ...], list[Tile]] = {}
    for tile in tiles:
        if _seen(tile, totals):
            yield tile
        else:
            small.setdefault(tile.path[:-1], []).append(tile)
    for depth in range(max(map(len, small), default=0), -1, -1):
        for path in [path for path in small if len(path) == depth]:
            group = small.pop(path)
            one = _joined((*path, f"({len(group):,} small ones)"), group)
            if _seen(one, totals) or not path:
                yield one if len(group) > 1 else group[0]
            else:
                small.setdefault(path[:-1], []).extend(group)


def _seen(tile: Tile, totals: Sequence[int]) -> bool:
    return any(size / total >= _LEAST_SHARE for size, total in zip(tile.sizes, totals, strict=True))


def _joined(path: tuple[str, ...], group: Sequence[Tile]) -> Tile:
    sizes = tuple(map(sum, zip(*(tile.sizes for tile in group), strict=True)))
    largest = [max(group, key=lambda tile: tile.sizes[which]) for which in range(len(sizes))]
    start = "".join(f"{part}." for part in path[:-1])
    return Tile(path, sizes, tuple(tile.families[which] for which, tile in enumerate(largest)), start)


def _tree(tiles: Sequence[Tile]) -> _Node:
    root = _Node()
    for tile in tiles:
        node = root
        for part in tile.path[:-1]:
            node = node.inner.setdefault(part, _Node())
        node.tiles.append(tile)
    return root


def _place(root: _Node, which: int, found: TreemapLayout) -> None:
    """Place all tiles; without recursion, because a name in a file may have any number of components."""
    waiting = [(root, (0.0, 0.0, found.width, found.height), 0)]
    while waiting:
        node, box, depth = waiting.pop(0)
        while not node.tiles and len(node.inner) == 1:  # a module that only contains one module has no frame
            (node,) = node.inner.values()
        if depth:
            found.frames.append((box, depth))
        parts: list[tuple[tuple[int, ...], Tile | _Node]] = [(tile.sizes, tile) for tile in node.tiles]
        parts += [(inner.sizes(), inner) for inner in node.inner.values()]
        parts.sort(key=lambda part: -part[0][0])
        for part, place in _squares([part for part in parts if part[0][which]], which, box):
            if isinstance(part, Tile):
                found.tiles.append((part, place))
            else:
                waiting.append((part, place, depth + 1))


Part = TypeVar("Part")


def _squares(parts: Sequence[tuple[tuple[int, ...], Part]], which: int, box: Box) -> Iterator[tuple[Part, Box]]:
    """The parts with their boxes, in two steps if there are many: see `_MOST_PARTS`."""
    import squarify

    if not parts or min(box[2:]) <= 0:
        return
    groups = [parts[i : i + _MOST_PARTS] for i in range(0, len(parts), _MOST_PARTS)]
    if len(groups) == 1:
        groups = [[part] for part in parts]
    sizes = squarify.normalize_sizes([sum(sizes[which] for sizes, _ in group) for group in groups], *box[2:])
    for group, r in zip(groups, squarify.squarify(sizes, *box), strict=True):
        place = (r["x"], r["y"], r["dx"], r["dy"])
        if len(group) == 1:
            yield group[0][1], place
        else:
            yield from _squares(group, which, place)


def draw(name: str, tiles: Sequence[Tile], which: int, area_per_byte: float, label: str) -> Picture:
    """Draw one map, with a name for the drawing that is unique within the page; the rest as for `lay_out`."""
    layout = lay_out(tiles, which, area_per_byte)
    with sheet(name, layout.width, layout.height) as page:
        page.figure.set_layout_engine("none")
        axes = page.figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, layout.width), ylim=(layout.height, 0))
        axes.set_axis_off()
        for tile, box in layout.tiles:
            drawn = _box(axes, box, _LINES[-1], colour(tile.families[which]))
            page.name(drawn, f"{tile.name}: {tile.sizes[which]:,} bytes", f"^{tile.start[:_MOST_SEARCHED]}")
        for box, depth in reversed(layout.frames):
            _box(axes, box, _LINES[min(depth, len(_LINES)) - 1], "none")
        for tile, box in layout.tiles:
            _write(axes, tile, box, which)
        return page.picture(label)


def _box(axes: Axes, box: Box, line: float, fill: str) -> Artist:
    from matplotlib.patches import Rectangle

    x, y, width, height = box
    edge = colour("surface")
    return axes.add_patch(Rectangle((x, y), width, height, fc=fill, ec=edge, lw=line, clip_on=False))


def _write(axes: Axes, tile: Tile, box: Box, which: int) -> None:
    """Write the end of the name, as much as there is room for, and the bytes below it if they fit too."""
    x, y, width, height = box
    letters, room = int((width - 8) / (_LETTER * _FONT)), int((height - 6) / (1.25 * _FONT))
    names = (_wrapped(tile.path[i:], letters) for i in range(len(tile.path)))
    lines = next((name for name in names if len(name) <= room and max(map(len, name)) <= letters), [])
    ink: dict[str, Any] = {"color": colour("on-tile"), "fontsize": _FONT, "va": "top", "clip_on": False}
    for number, line in enumerate(lines):
        axes.text(x + 5, y + 4 + 1.25 * _FONT * number, line, weight="bold", **ink)
    size = bytes_in_words(tile.sizes[which])
    if lines and len(lines) < room and len(size) <= letters:
        axes.text(x + 5, y + 4 + 1.25 * _FONT * len(lines), size, **ink)


def _wrapped(path: Sequence[str], letters: int) -> list[str]:
    """A dotted name as lines that break after dots.

    >>> _wrapped(("encoder", "layer", "0", "query"), 14)
    ['encoder.layer.', '0.query']
    """
    lines = [""]
    for part in [*(f"{part}." for part in path[:-1]), path[-1]]:
        if lines[-1] and len(lines[-1]) + len(part) > letters:
            lines.append("")
        lines[-1] += part
    return lines
