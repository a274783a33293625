"""What people read at a terminal: sizes, tables and progress."""

from __future__ import annotations

import io
import re
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
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
    """Bytes from a number or from a number with a unit.

    Raises:
        ConfigError: anything else.

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
            f"{size!r} is no size",
            where="max_size",
            remedy='Use bytes (12000000), "12MB" (10^6) or "12MiB" (2^20).',
        )
    return nbytes


_PATIENCE = 1.0


class Stages:
    """The stages of one long job, one line at a time on standard error.

    Args:
        quiet: show nothing; also the case where standard error is no terminal.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._silent = quiet or not console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )

    @contextmanager
    def stage(self, description: str) -> Iterator[None]:
        """Show the description, once a second has passed, until the stage ends."""
        if self._silent:
            yield
            return
        task = self._progress.add_task(description)
        timer = threading.Timer(_PATIENCE, self._progress.start)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            self._progress.stop()
            self._progress.remove_task(task)


@contextmanager
def bytes_done(description: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on standard error, once a second has passed; gives the function that is told of each advance.

    Args:
        description: stands before the bar.
        total: bytes in all.
        quiet: show nothing; also the case where standard error is no terminal.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    task = bar.add_task(description, total=total)
    timer = threading.Timer(_PATIENCE, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda nbytes: bar.advance(task, nbytes)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


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
