"""The command line: each command parses its options, makes one call and prints the result."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

import pared
from pared.checkpoints import compress, expand
from pared.errors import ConfigError, ParedError, printable
from pared.files.disk import as_path, make_directory, write_atomic
from pared.inspection.page import charts, data, page
from pared.inspection.page.drawing import require_library

if TYPE_CHECKING:
    from pared.artifact.outcome import Curve

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
_MaxSize = Annotated[str | None, typer.Option(help='The largest file allowed, for example "12MB".')]
_Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Show nothing.")]
_Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show the log.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"pared {pared.__version__}")
        raise typer.Exit


@app.command()
def fit(
    model: Annotated[str, typer.Argument(metavar="PKG.MOD:FACTORY", help="A function that returns the float model.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", parser=path, help="The directory to write to.")
    ] = None,
    calib: Annotated[
        str | None, typer.Option(metavar="PKG.MOD:OBJ", help="Calibration batches, or a function that calls the model.")
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option("--eval", metavar="PKG.MOD:FUNC", help="A function that scores a model.")
    ] = None,
    confirm: Annotated[
        str | None,
        typer.Option(metavar="PKG.MOD:FUNC", help="A function that scores it on other data, to confirm the result."),
    ] = None,
    tolerable_loss: Annotated[
        float | None, typer.Option(help="The acceptable loss, as a share of the float model's score; 0.01 by default.")
    ] = None,
    absolute: Annotated[bool, typer.Option("--absolute", help="The loss is in the unit of the score instead.")] = False,
    lower_is_better: Annotated[bool, typer.Option("--lower-is-better", help="A lower score is better.")] = False,
    approach: Annotated[str | None, typer.Option(help="auto (the default), static, dynamic or weight_only.")] = None,
    quant_level: Annotated[
        int | None, typer.Option(min=0, max=1, help="0: nothing coarser than 8 bits; 1: every format.")
    ] = None,
    max_size: _MaxSize = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=BITS|keep", help="Decide for the tensors whose names match; may be repeated."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="The number of calibration samples to read.")] = None,
    logits: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTPUT", help="An output that holds logits, if that is not seen; may be repeated."),
    ] = None,
    max_trials: Annotated[int | None, typer.Option(help="The largest number of models to evaluate.")] = None,
    timeout: Annotated[float | None, typer.Option(help="The seconds after which no new trial starts.")] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of all random numbers.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if a weight would stay in float without a rule that says so.")
    ] = False,
    workspace: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="A directory for the search's records: an interrupted search resumes from them."
        ),
    ] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Write the trade-off between bytes, damage and score instead of a model.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate bytes and seconds, and write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress and no report.")] = False,
    verbose: _Verbose = False,
) -> None:
    """Compress a model and write it to a directory."""
    _show_log(verbose)
    search = pared.fit  # first of all: without torch it says what to install
    _check_mode(output, curve, dry_run, recorded=workspace is not None or confirm is not None)
    criterion = _given(
        tolerable_loss=tolerable_loss,
        criterion="absolute" if absolute else None,
        higher_is_better=False if lower_is_better else None,
    )
    conf = pared.PostTrainingQuantConfig(
        accuracy_criterion=pared.AccuracyCriterion(**criterion),
        **_given(
            approach=approach,
            quant_level=quant_level,
            max_size=_size(max_size),
            rules=[_rule(text) for text in rule or ()] or None,
            calibration_sampling_size=samples,
            logits=tuple(logits or ()) or None,
            max_trials=max_trials,
            timeout=timeout,
            seed=seed,
            strict=strict or None,
        ),
    )
    job = _built(model), conf, _batches(calib)
    if output is None or dry_run:
        guess = pared.estimate(*job)
        typer.echo(
            f"at 8 bits about {guess.nbytes:,} bytes ({guess.nbytes / guess.original_nbytes:.3f} of "
            f"{guess.original_nbytes:,}) and {guess.seconds:.1f} s; a search below 8 bits takes longer and makes "
            "a smaller file; nothing was written"
        )
    elif curve:
        _write_curve(pared.trade_off(*job, _named(evaluate), quiet=quiet), output, quiet)
    else:
        small = search(*job, _named(evaluate), _named(confirm), workspace=workspace, quiet=quiet)
        _write_model(small, output, quiet)


def _check_mode(output: Path | None, curve: bool, dry_run: bool, *, recorded: bool) -> None:
    """Refuse options that exclude each other, and prepare the directory: before hours of work, not after."""
    if output is None and not dry_run:
        raise ConfigError("no directory to write to", where="pared fit", remedy="Pass -o DIRECTORY, or --dry-run.")
    if curve and (recorded or dry_run):
        raise ConfigError(
            "--curve excludes --workspace, --confirm and --dry-run",
            where="pared fit",
            remedy="A curve has no search to record, confirm or estimate: leave them out.",
        )
    if curve:
        require_library()
    if output is not None and not dry_run:
        make_directory(as_path(output, "-o"))


def _write_model(model: Any, output: Path, quiet: bool) -> None:
    """Save the model with its report; the page only if the libraries that draw it are installed."""
    path = pared.save(model, output)
    html: Path | None = output / page.REPORT
    try:
        require_library()
    except ConfigError as error:
        typer.echo(f"no {page.REPORT}: {error}", err=True)
        html = None
    text = pared.report(model, html=html)
    if not quiet:
        typer.echo(f"{text}\n\nwritten: {path} ({path.stat().st_size:,} bytes)")


def _write_curve(curve: Curve, output: Path, quiet: bool) -> None:
    """Write the curve as JSON and as a picture, and show its table."""
    picture = charts.trade_off(curve.points, curve.baseline).standalone()
    for name, text in (("curve.json", json.dumps(curve.to_json(), indent=1)), ("curve.svg", picture)):
        write_atomic(output / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]  # bound now
    if not quiet:
        typer.echo(f"{curve}\n\nwritten: {output / 'curve.json'}, {output / 'curve.svg'}")


@app.command("tune-speed")
def tune_speed(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", parser=path, help="The directory of a saved quantized model.")
    ],
    model: Annotated[
        str, typer.Option(metavar="PKG.MOD:FACTORY", help="A function that returns a model of its architecture.")
    ],
    calib: Annotated[
        str, typer.Option(metavar="PKG.MOD:OBJ", help="Batches of the sizes that matter, or a function that calls it.")
    ],
    quiet: _Quiet = False,
    verbose: _Verbose = False,
) -> None:
    """Measure again which kernels are fastest on this machine; the model's file is not changed."""
    _show_log(verbose)
    tune = pared.tune_speed  # it says what to install where torch is missing
    tuned = tune(directory, _built(model), _batches(calib))
    if not quiet:
        from pared.runtime.record import record_of  # only now: it needs torch

        typer.echo("\n".join(record_of(tuned).profile.summary()))


@app.command("compress")
def compress_file(
    path: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", parser=path, help="A .safetensors or .pt file, or a Hugging Face folder."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", parser=path, help="The directory to write to.")],
    bits: Annotated[float | None, typer.Option(help="Bits per weight; 8 by default, 16 for float16.")] = None,
    max_size: _MaxSize = None,
    target: Annotated[
        str | None, typer.Option(help="Write it for a runtime instead: gguf, compressed-tensors, gptq, mlx, ...")
    ] = None,
    quiet: _Quiet = False,
    verbose: _Verbose = False,
) -> None:
    """Compress a checkpoint without the model's code; after an interruption, the same command continues the work."""
    _show_log(verbose)
    done = compress.run(path, output, **_given(bits=bits, max_size=_size(max_size), target=target), quiet=quiet)
    if not quiet:
        typer.echo(_harmless(done))


@app.command("expand")
def expand_file(
    path: Annotated[Path, typer.Argument(parser=path, help="An artifact, or the directory that contains it.")],
    output: Annotated[Path, typer.Option("-o", "--output", parser=path, help="A .safetensors file, or a directory.")],
    quiet: _Quiet = False,
) -> None:
    """Turn an artifact back into floats, as a .safetensors file."""
    done = expand.run(path, output, quiet=quiet)
    if not quiet:
        typer.echo(_harmless(done))


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
    ledger = pared.inspect(path, **_given(depth="quick" if quick else "deep" if deep else None))
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
    typer.echo(json.dumps(comparison.to_json(), indent=1) if as_json else comparison.render(**_given(most=most)))


def _given(**options: Any) -> dict[str, Any]:
    """The options that the user gave; the others keep the defaults of the configuration."""
    return {name: value for name, value in options.items() if value is not None}


def _harmless(text: object) -> str:
    """Text that may hold names from files, with control characters escaped, line by line."""
    return "\n".join(map(printable, str(text).split("\n")))


def _size(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


def _rule(text: str) -> pared.Rule:
    pattern, _, value = text.rpartition("=")
    if pattern and value == "keep":
        return pared.Rule(pattern, keep=True)
    try:
        return pared.Rule(pattern, bits=float(value))
    except ValueError as error:
        if isinstance(error, ParedError):
            raise
        raise ConfigError(
            f"{text!r} is not a rule",
            where="--rule",
            remedy="Write PATTERN=BITS or PATTERN=keep, for example 'encoder.*=4'.",
        ) from error


def _named(place: str | None) -> Any:
    """The object that PKG.MOD:NAME refers to; None for None.

    Raises:
        ConfigError: it cannot be imported.
    """
    if place is None:
        return None
    module_name, _, attribute = place.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        target: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            target = getattr(target, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot be imported ({error})",
            where=place,
            remedy="Write PKG.MOD:NAME; the current directory is on the import path.",
        ) from error
    return target


def _built(place: str) -> Any:
    """The model: the named object, or what it returns if it is a factory."""
    target = _named(place)
    return target() if callable(target) and not hasattr(target, "state_dict") else target


def _batches(place: str | None) -> Any:
    """Calibration data: batches, or a function that calls the model; a function without arguments makes either."""
    target = _named(place)
    try:
        inspect.signature(target).bind()
    except (TypeError, ValueError):  # it takes arguments, or is not a function
        return target
    return target()


def _show_log(verbose: bool) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])


def main() -> None:
    """Run the command line. Errors of `pared.errors` go to standard error without a traceback; the exit status is 2."""
    try:
        app()
    except ParedError as error:
        typer.echo(_harmless(f"error: {error}"), err=True)
        if error.__cause__ is not None:
            logging.getLogger("pared").info("caused by", exc_info=error.__cause__)
        raise SystemExit(2) from None
