"""Progress for people at a terminal: shown for whatever takes over a second, silent everywhere else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
