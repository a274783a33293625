"""Commands that take files, and need neither torch nor the model's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import pared
from pared.checkpoints import compress, expand
from pared.checkpoints.runtimes.conversion import convert
from pared.cli.app import MaxSize, Quiet, Verbose, Workers, app, given, harmless, path, show_log, size, tell_sent, told
from pared.errors import ConfigError
from pared.executors.cluster import executor_at
from pared.files.disk import as_path
from pared.files.remote.urls import output_at
from pared.inspection.page import data, page
from pared.inspection.page.drawing import require_library


@app.command("compress")
def compress_file(
    path: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", parser=path, help="A .safetensors or .pt file, or a Hugging Face folder."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", parser=path, help="The directory to write to.")],
    bits: Annotated[
        float | None, typer.Option(help="Bits per weight; 16 for float16. 8 by default, but with --target none is.")
    ] = None,
    max_size: MaxSize = None,
    target: Annotated[
        str | None, typer.Option(help="Write it for a runtime instead: gguf, compressed-tensors, gptq, mlx, ...")
    ] = None,
    workers: Workers = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compress a checkpoint without the model's code; after an interruption, the same command continues the work."""
    show_log(verbose)
    options = given(bits=bits, max_size=size(max_size), target=target)
    with executor_at(workers, told(quiet)) as executor, output_at(output, "-o") as place:
        done = compress.run(path, place, **options, quiet=quiet, executor=executor)
    if not quiet:
        typer.echo(harmless(done))
        tell_sent(output)


@app.command("expand")
def expand_file(
    path: Annotated[Path, typer.Argument(parser=path, help="An artifact, or the directory that contains it.")],
    output: Annotated[Path, typer.Option("-o", "--output", parser=path, help="A .safetensors file, or a directory.")],
    quiet: Quiet = False,
) -> None:
    """Turn an artifact back into floats, as a .safetensors file."""
    with output_at(output, "-o") as place:
        done = expand.run(path, place, quiet=quiet)
    if not quiet:
        typer.echo(harmless(done))
        tell_sent(output)


@app.command("export")
def export_artifact(
    path: Annotated[Path, typer.Argument(metavar="ARTIFACT", parser=path, help="An artifact, or its directory.")],
    output: Annotated[Path, typer.Option("-o", "--output", parser=path, help="The file or directory to write.")],
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="gguf, compressed-tensors, gptq, mlx, ...")],
    folder: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="The Hugging Face folder with config.json and the tokenizer; the artifact's directory by default.",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write an artifact for another runtime, where that is exact; nothing is rounded a second time."""
    show_log(verbose)
    done = convert(path, output, to, folder)
    if not quiet:
        typer.echo(harmless(done))


@app.command("inspect")
def inspect_file(
    path: Annotated[
        Path,
        typer.Argument(
            parser=path, help="A file of pared, torch, safetensors, ONNX, GGUF or NumPy, or a folder of them."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    html: Annotated[Path | None, typer.Option(parser=path, help="Also write an HTML page to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Read only the headers.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Read all numbers instead of at most 1 GB.")] = False,
) -> None:
    """Show what takes up the bytes of a file, and why it is larger than necessary; nothing in it is executed."""
    if quick and deep:
        raise ConfigError(
            "--quick and --deep contradict each other", where="pared inspect", remedy="Pass one of them, or neither."
        )
    if html is not None:
        require_library()
        if as_path(html, "--html").exists() and as_path(path, "inspect").exists() and html.samefile(path):
            raise ConfigError("is the file to inspect", where=str(html), remedy="Write the page to another file.")
    ledger = pared.inspect(path, **given(depth="quick" if quick else "deep" if deep else None))
    if html is not None:
        page.write(data.of_file(path, ledger), html)
    typer.echo(json.dumps(ledger.to_json(), indent=1) if as_json else ledger.render())
    if html is not None:
        typer.echo(f"written: {html}", err=as_json)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(parser=path, help="The reference: a file or folder of weights, or an artifact.")],
    b: Annotated[Path, typer.Argument(parser=path, help="The model to compare with it, in any of the same forms.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every tensor, instead of tables.")] = False,
    most: Annotated[
        int | None, typer.Option(min=1, help="The largest number of rows in a table; the worst come first.")
    ] = None,
) -> None:
    """Show how two models differ, tensor by tensor; the exit status is 0 even if they differ."""
    comparison = pared.compare(a, b)
    typer.echo(json.dumps(comparison.to_json(), indent=1) if as_json else comparison.render(**given(most=most)))
