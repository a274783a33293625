"""The program, what its commands have in common, and how it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

import pared
from pared.errors import ParedError, printable
from pared.files.remote.urls import url_of

app = typer.Typer(
    help="Compress PyTorch models: the smallest file and the fastest CPU inference that keep the accuracy you ask for.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def path(text: str) -> Path | str:
    """A path from the command line; an empty one stays a text, which each verb refuses: a `Path` of it would be "."."""
    return Path(text) if text else text


# Options that several commands have.
MaxSize = Annotated[str | None, typer.Option(help='The largest file allowed, for example "12MB".')]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Show nothing.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show the log.")]

Workers = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="A Ray cluster that does the work: ray://HOST:10001. Default: this machine."),
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"pared {pared.__version__}")
        raise typer.Exit


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave; the others keep the defaults of the configuration."""
    return {name: value for name, value in options.items() if value is not None}


def harmless(text: object) -> str:
    """Text that may hold names from files, with control characters escaped, line by line."""
    return "\n".join(map(printable, str(text).split("\n")))


def told(quiet: bool) -> Callable[[str], object]:
    """Shows a line on standard error, or nothing."""
    return (lambda _: None) if quiet else partial(typer.echo, err=True)


def tell_sent(output: object) -> None:
    """Say where the files of a command are whose output is a URL: what it said before was about this machine."""
    url = url_of(output)
    if url is not None:
        typer.echo(f"sent to {url}")


def size(text: str | None) -> int | str | None:
    """A size from the command line: plain digits are bytes."""
    return int(text) if text is not None and text.isdecimal() else text


def show_log(verbose: bool) -> None:
    """Show warnings, or the whole log, on standard error."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])


def main() -> None:
    """Run the command line. Errors of `pared.errors` go to standard error without a traceback; the exit status is 2."""
    try:
        app()
    except ParedError as error:
        typer.echo(harmless(f"error: {error}"), err=True)
        if error.__cause__ is not None:
            logging.getLogger("pared").info("caused by", exc_info=error.__cause__)
        raise SystemExit(2) from None
