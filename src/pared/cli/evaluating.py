"""`pared evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import pared
from pared.cli.app import Quiet, Verbose, Workers, app, harmless, path, show_log, told
from pared.executors.cluster import executor_at
from pared.files.disk import as_path


@app.command("evaluate")
def evaluate_folder(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", parser=path, help="A Hugging Face folder, or one that `pared fit` wrote from one."
        ),
    ],
    text: Annotated[Path, typer.Option(parser=path, help="The text to predict, a file in UTF-8.")],
    reference: Annotated[
        Path | None, typer.Option(parser=path, help="The folder of the model to compare with, such as the float one.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="The most tokens that are read at once; 512 by default, if the model takes them.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="How many tokens a window goes on; one less than the context by default.")
    ] = None,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show how well a language model predicts a text, and how far it is from a reference."""
    show_log(verbose)
    evaluate = pared.evaluate  # first of all: without torch it says what to install
    place = as_path(text, "--text")
    with executor_at(workers, told(quiet)) as executor:
        found = evaluate(model, place, reference, context=context, stride=stride, quiet=quiet, executor=executor)
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else harmless(found))
