"""Tables of 100 columns for a terminal, with numbered notes below."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pared.errors import printable

WIDTH: Final = 100  # in columns

_LEFT: Final = ("format", "class", "only in", "shape", "")
_MOST_WIDTHS: Final[Mapping[str, int]] = {"format": 11, "class": 12, "shape": 20}


def new_table(first: str, *others: str) -> Table:
    """A table without rows; the first column takes the width that the others leave.

    Args:
        first: its heading.
        others: of these. Columns of words are on the left, those of figures on the right: `_LEFT` says which.
    """
    table = Table(box=box.SIMPLE_HEAD, width=WIDTH, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold", ratio=1)
    for name in others:
        left = name in _LEFT
        table.add_column(
            name,
            justify="left" if left else "right",
            overflow="fold",
            max_width=_MOST_WIDTHS.get(name),
            no_wrap=not left,
        )
    return table


def add_row(table: Table, cells: Sequence[str]) -> None:
    """One more row, a text for each column."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


def drawn(table: Table) -> Iterator[str]:
    """The lines of a table."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    yield from (line.rstrip() for line in capture.get().splitlines())


def wrapped(indent: str, text: str) -> list[str]:
    """Text in as many lines as it needs, each under the other."""
    return textwrap.wrap(printable(text), WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent))


def and_more(count: int, what: str) -> Iterator[str]:
    """What a table does not show, if anything."""
    if count > 0:
        yield f" and {count:,} more {what}"


class Notes:
    """Footnotes, numbered as they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, note: str) -> str:
        """What refers to a note; equal notes have one number, and no note has none."""
        return f" [{self._numbers.setdefault(note, len(self._numbers) + 1)}]" if note else ""

    def lines(self) -> Iterator[str]:
        """The notes themselves."""
        for note, number in self._numbers.items():
            yield from wrapped(f" [{number}] ", note)
