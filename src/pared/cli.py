"""The command line: parse, one call, print."""

from __future__ import annotations

import importlib
import inspect as signatures
import json
import logging
import sys
from collections.abc import Callable
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
    help="Compress PyTorch models: the smallest file and the fastest CPU inference that keep their accuracy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Directory to write.")] = None,
    calib: Annotated[
        str | None,
        typer.Option(metavar="PKG.MOD:OBJ", help="Calibration batches, or a function that calls the model."),
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option("--eval", metavar="PKG.MOD:FUNC", help="A function that scores a model.")
    ] = None,
    confirm: Annotated[
        str | None,
        typer.Option(metavar="PKG.MOD:FUNC", help="The same on other data, to confirm the result."),
    ] = None,
    tolerable_loss: Annotated[float | None, typer.Option(help="How much of the score may be lost.")] = None,
    absolute: Annotated[bool, typer.Option("--absolute", help="The loss is in the score's own unit.")] = False,
    lower_is_better: Annotated[bool, typer.Option("--lower-is-better", help="The score is a loss.")] = False,
    approach: Annotated[str | None, typer.Option(help="auto, static, dynamic or weight_only.")] = None,
    quant_level: Annotated[
        int | None, typer.Option(min=0, max=1, help="0: nothing coarser than 8 bits; 1: all that is allowed.")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help='The most bytes the file may take, "12MB" for instance.')] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=BITS|keep", help="Decide for the tensors that match; may be repeated."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="How many calibration samples are read.")] = None,
    max_trials: Annotated[int | None, typer.Option(help="How many evaluations may be made.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which no new trial begins.")] = None,
    seed: Annotated[int | None, typer.Option(help="For everything that is drawn by chance.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse to leave a weight in float without a rule.")] = False,
    workspace: Annotated[
        Path | None, typer.Option(help="Directory for the search's records: a killed search goes on from there.")
    ] = None,
    curve: Annotated[
        bool,
        typer.Option("--curve", help="Write the trade-off between bytes, damage and score, and no model."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Predict bytes and seconds, and do nothing.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress and no report.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the log.")] = False,
) -> None:
    """Compress a model and write it to a directory."""
    _show_log(verbose)
    search = pared.fit  # before anything is written: it says what to install where torch is missing
    if output is None and not dry_run:
        raise ConfigError("no place to write to", where="pared fit", remedy="Pass -o DIRECTORY, or --dry-run.")
    if curve and (workspace is not None or confirm is not None or dry_run):
        raise ConfigError(
            "--curve goes with none of --workspace, --confirm and --dry-run",
            where="pared fit",
            remedy="A curve has no search to record, confirm or predict: leave these out.",
        )
    criterion = _given(
        tolerable_loss=tolerable_loss,
        criterion="absolute" if absolute else None,
        higher_is_better=False if lower_is_better else None,
    )
    if curve:
        require_library()
    if output is not None and not dry_run:
        make_directory(as_path(output, "-o"))  # before hours of work, not after
    conf = pared.PostTrainingQuantConfig(
        accuracy_criterion=pared.AccuracyCriterion(**criterion),
        **_given(
            approach=approach,
            quant_level=quant_level,
            max_size=_size(max_size),
            rules=[_rule(text) for text in rule or ()] or None,
            calibration_sampling_size=samples,
            max_trials=max_trials,
            timeout=timeout,
            seed=seed,
            strict=strict or None,
        ),
    )
    source = _made(model)
    calibration = _batches(calib)
    if dry_run:
        guess = pared.estimate(source, conf, calibration)
        typer.echo(
            f"at 8 bits about {guess.nbytes:,} bytes ({guess.nbytes / guess.original_nbytes:.3f} of "
            f"{guess.original_nbytes:,}), about {guess.seconds:.1f} s; a search below 8 bits takes longer and fewer "
            "bytes; nothing was written"
        )
        return
    assert output is not None
    if curve:
        _write_curve(pared.trade_off(source, conf, calibration, _named(evaluate), quiet=quiet), output, quiet)
        return
    small = search(source, conf, calibration, _named(evaluate), _named(confirm), workspace=workspace, quiet=quiet)
    path = pared.save(small, output)
    text = _reported(small, output / page.REPORT)
    if not quiet:
        typer.echo(text)
        typer.echo(f"\nwritten: {path} ({path.stat().st_size:,} bytes)")


def _reported(model: Any, html: Path) -> str:
    """The report as text; the page is written where the libraries that draw it are installed."""
    try:
        require_library()
    except ConfigError as error:
        typer.echo(f"no {html.name}: {error}", err=True)
        return pared.report(model)
    return pared.report(model, html=html)


def _write_curve(found: Curve, output: Path, quiet: bool) -> None:
    """Write the curve as JSON and as a picture, and show its table."""
    picture = charts.trade_off(found.points, found.baseline).standalone()
    for name, text in (("curve.json", json.dumps(found.to_json(), indent=1)), ("curve.svg", picture)):
        write_atomic(output / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]  # bound now
    if not quiet:
        typer.echo(found)
        typer.echo(f"\nwritten: {output / 'curve.json'}, {output / 'curve.svg'}")


@app.command("tune-speed")
def tune_speed(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where a quantized model was saved.")],
    model: Annotated[str, typer.Option(metavar="PKG.MOD:FACTORY", help="A function that returns the architecture.")],
    calib: Annotated[
        str, typer.Option(metavar="PKG.MOD:OBJ", help="Batches of the sizes that matter, or a function that calls it.")
    ],
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show nothing.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the log.")] = False,
) -> None:
    """Measure anew which kernels are fastest on this machine; the model's file stays as it is."""
    from pared.runtime.record import record_of  # only now: it needs torch

    _show_log(verbose)
    found = pared.tune_speed(directory, _made(model), _batches(calib))
    if not quiet:
        typer.echo("\n".join(record_of(found).profile.summary()))


@app.command("compress")
def compress_file(
    path: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A .safetensors or .pt file, or a Hugging Face folder.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    bits: Annotated[
        float | None, typer.Option(help="Bits that each weight takes; 8 by default, 16 for float16.")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help='The most bytes the file may take, "12MB" for instance.')] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show nothing.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show the log.")] = False,
) -> None:
    """Compress a checkpoint without the model's code; a run that was killed goes on where it stopped."""
    _show_log(verbose)
    done = compress.run(path, output, **_given(bits=bits, max_size=_size(max_size)), quiet=quiet)
    if not quiet:
        typer.echo(_harmless(done))


@app.command("expand")
def expand_file(
    path: Annotated[Path, typer.Argument(help="An artifact, or the directory that it is in.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A .safetensors file, or a directory.")],
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show nothing.")] = False,
) -> None:
    """Turn an artifact back into floats, as a .safetensors file."""
    done = expand.run(path, output, quiet=quiet)
    if not quiet:
        typer.echo(_harmless(done))


@app.command("inspect")
def inspect_file(
    path: Annotated[
        Path,
        typer.Argument(help="A file of pared, torch, safetensors, ONNX, GGUF or NumPy, or a folder of them."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page for a browser to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Read headers alone.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Read all numbers, not 1 GB of them at most.")] = False,
) -> None:
    """Show what takes the bytes of a file, and why it is larger than it should be; nothing in it is executed."""
    if quick and deep:
        raise ConfigError(
            "--quick and --deep contradict each other", where="pared inspect", remedy="Pass one of them, or neither."
        )
    if html is not None:
        require_library()
        if as_path(html, "--html").exists() and as_path(path, "inspect").exists() and html.samefile(path):
            raise ConfigError("is the file itself", where=str(html), remedy="Choose another place for the page.")
    ledger = pared.inspect(path, **_given(depth="quick" if quick else "deep" if deep else None))
    if html is not None:
        page.write(data.of_file(path, ledger), html)
    typer.echo(json.dumps(ledger.to_json(), indent=1) if as_json else ledger.render())
    if html is not None:
        typer.echo(f"written: {html}", err=as_json)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="The reference: a file or folder of weights, or an artifact.")],
    b: Annotated[Path, typer.Argument(help="What is compared to it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every tensor, instead of tables.")] = False,
    most: Annotated[int | None, typer.Option(min=1, help="How many rows a table has; the worst come first.")] = None,
) -> None:
    """Show how two models differ, tensor by tensor; the exit status is 0 however much they do."""
    found = pared.compare(a, b)
    typer.echo(json.dumps(found.to_json(), indent=1) if as_json else found.render(**_given(most=most)))


def _given(**options: Any) -> dict[str, Any]:
    """The options that the user gave: the others keep the defaults of the configuration."""
    return {name: value for name, value in options.items() if value is not None}


def _harmless(text: object) -> str:
    """Lines that may hold names from files, without what would steer a terminal."""
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
            f"{text!r} is no rule",
            where="--rule",
            remedy="Write PATTERN=BITS or PATTERN=keep, 'encoder.*=4' for instance.",
        ) from error


def _named(place: str | None) -> Any:
    """The object that PKG.MOD:NAME names."""
    if place is None:
        return None
    module_name, _, attribute = place.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot be imported ({error})",
            where=place,
            remedy="Write PKG.MOD:NAME; the current directory is on the import path.",
        ) from error
    return found


def _made(place: str) -> Any:
    """The model: the named object, called if it is a factory."""
    found = _named(place)
    return found() if callable(found) and not hasattr(found, "state_dict") else found


def _batches(place: str | None) -> Any:
    """Calibration data: batches, a function that makes them, or a function that calls the model."""
    found = _named(place)
    return found() if _takes_nothing(found) else found


def _takes_nothing(found: object) -> bool:
    if not callable(found):
        return False
    call: Callable[..., object] = found
    try:
        signatures.signature(call).bind()
    except TypeError:
        return False
    return True


def _show_log(verbose: bool) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])


def main() -> None:
    """Run the command line; errors of ours are shown without a traceback, on standard error, with exit status 2."""
    try:
        app()
    except ParedError as error:
        typer.echo(_harmless(f"error: {error}"), err=True)
        if error.__cause__ is not None:
            logging.getLogger("pared").info("caused by", exc_info=error.__cause__)
        raise SystemExit(2) from None
