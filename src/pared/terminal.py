"""What people read at a terminal: sizes, tables and progress."""

from __future__ import annotations

import io
import re
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from pared.errors import ConfigError, printable
from pared.scalars import plain

_UNITS: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes from a number, or from a text with a number and a unit.

    Raises:
        ConfigError: it is neither.

    >>> parse_size("12MB"), parse_size("12 MiB"), parse_size(1000)
    (12000000, 12582912, 1000)
    """
    size = plain(size)
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B)\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    nbytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if nbytes == 0:
        raise ConfigError(
            f"{size!r} is not a size",
            where="max_size",
            remedy='Use bytes (12000000), "12MB" (10^6) or "12MiB" (2^20).',
        )
    return nbytes


_PATIENCE: Final = 1.0  # seconds before progress is shown


@contextmanager
def _progress(quiet: bool, *columns: ProgressColumn) -> Iterator[Progress | None]:
    """A display on standard error, from the second second on; None if quiet, or if standard error is not a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    timer = threading.Timer(_PATIENCE, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield progress
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


class Stages:
    """The stages of one long job, one line at a time on standard error.

    Args:
        quiet: show nothing; nothing is shown either where standard error is not a terminal.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    @contextmanager
    def stage(self, description: str) -> Iterator[None]:
        """Show the description until the stage ends, unless it takes less than a second."""
        with _progress(self._quiet, SpinnerColumn(), TextColumn("{task.description}")) as progress:
            if progress is not None:
                progress.add_task(description)
            yield


@contextmanager
def bytes_done(description: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, from the second second on; yields the function to call with the bytes done.

    Args:
        description: what is shown before the bar.
        total: the bytes of the whole job.
        quiet: show nothing; nothing is shown either where standard error is not a terminal.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with _progress(quiet, *columns) as progress:
        if progress is None:
            yield lambda _: None
        else:
            task = progress.add_task(description, total=total)
            yield lambda nbytes: progress.advance(task, nbytes)


WIDTH: Final = 100  # in columns

# Columns of words, with the width at which they wrap (None: the widest cell). All others hold numbers.
_WORDS: Final[Mapping[str, int | None]] = {
    "tensor": None,
    "output of": None,
    "shape": 14,
    "format": 13,
    "class": 12,
    "only in": None,
    "runs": None,
    "": None,
}
_PARTS: Final = re.compile(r"[^./ ]*[./ ]|[^./ ]+")  # of a name, with what ends each
_MANY_ROWS: Final = 100
_LEAST_FILLING: Final = 10
_FILLING: Final = ("tensor", "output of")  # as wide as the other columns allow


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table as lines of at most 100 columns, with an empty line before and after it.

    Args:
        headings: the headings of the columns; `_WORDS` says which of them are on the left, the others are on the right.
        rows: a text for each column.

    >>> table(["trial", "score"], [["1", "0.25"]])
    ['', ' trial  score', ' ────────────', '     1   0.25', '']
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = _widths(headings, cells)
    if widths is not None:
        for i, width in enumerate(widths):
            for row in cells if headings[i] in _FILLING else ():
                row[i] = _divided(row[i], width)
    if widths is None or len(cells) <= _MANY_ROWS:
        return _drawn(headings, cells)
    # For very many rows a library's layout takes a minute, and kilobytes for each.
    blank = _drawn(headings, [], widths)
    lines = blank[:-1]
    for row in cells:
        lengths = [_width(cell) for cell in row]
        too_wide = any(length > width for length, width in zip(lengths, widths, strict=True))
        if too_wide or any(cell != cell.strip() or "\n" in cell for cell in row):
            lines += _drawn(headings, [row], widths)[len(blank) - 1 : -1]
            continue
        padded = [
            f"{cell}{' ' * (width - length)}" if heading in _WORDS else f"{' ' * (width - length)}{cell}"
            for heading, cell, length, width in zip(headings, row, lengths, widths, strict=True)
        ]
        lines.append(f" {'  '.join(padded)}".rstrip())
    return [*lines, blank[-1]]


def _divided(name: str, width: int) -> str:
    r"""A name that is wider than its column, as lines that end between its parts where they can.

    >>> _divided("model.layers.10.self_attn.q_proj.weight", 16)
    'model.layers.10.\nself_attn.\nq_proj.weight'
    """
    if _width(name) <= width:
        return name
    lines = [""]
    for part in _PARTS.findall(name):
        if lines[-1] and _width(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _width(text: str) -> int:
    """The columns of a terminal that a text takes."""
    return len(text) if text.isascii() else cell_len(text)


def _widths(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int] | None:
    """The width of each column where all but one are as wide as their widest cell; None: they would not fit so."""
    widths = [
        min(max(_width(heading), *map(_width, column)), _WORDS.get(heading) or WIDTH)
        for heading, column in zip(headings, zip(*cells, strict=True), strict=True)
    ]
    left = WIDTH - 2 * len(headings)  # a space at each end, two between columns
    filling = [i for i, heading in enumerate(headings) if heading in _FILLING]
    for i in filling:
        widths[i] = left - sum(widths[:i]) - sum(widths[i + 1 :])
    fits = len(filling) < 2 and sum(widths) <= left and all(widths[i] >= _LEAST_FILLING for i in filling)
    return widths if fits else None


def _drawn(headings: Sequence[str], cells: Iterable[Sequence[str]], widths: Sequence[int] | None = None) -> list[str]:
    """The lines of a table whose columns are as wide as their cells ask for, or have these widths."""
    drawn = Table(
        box=box.SIMPLE_HEAD,
        width=WIDTH if any(heading in _FILLING for heading in headings) else None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, heading in enumerate(headings):
        words = heading in _WORDS
        drawn.add_column(
            heading,
            justify="left" if words else "right",
            overflow="fold",
            ratio=1 if heading in _FILLING and widths is None else None,
            width=None if widths is None else widths[i],
            max_width=_WORDS.get(heading),
            no_wrap=not words,
        )
    for row in cells:
        drawn.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(drawn)
    return [line.rstrip() for line in capture.get().splitlines()]


def wrapped(indent: str, text: str) -> list[str]:
    """Text as lines of at most 100 columns; those after the first are indented as far as `indent` is long."""
    return textwrap.wrap(printable(text), WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent))


def and_more(count: int, what: str) -> Iterator[str]:
    """How many rows a table does not show, if any."""
    if count > 0:
        yield f" and {count:,} more {what}"


class Notes:
    """Footnotes, numbered in the order of their first use."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, note: str) -> str:
        """The reference to a note, such as " [1]"; equal notes share a number, and an empty note has none."""
        return f" [{self._numbers.setdefault(note, len(self._numbers) + 1)}]" if note else ""

    def lines(self) -> Iterator[str]:
        """The notes, each with its number."""
        for note, number in self._numbers.items():
            yield from wrapped(f" [{number}] ", note)
