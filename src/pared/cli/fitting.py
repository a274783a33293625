"""`pared fit` and `pared tune-speed`: commands that take a model."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import pared
from pared.cli.app import MaxSize, Quiet, Verbose, Workers, app, given, path, show_log, size, tell_sent, told
from pared.cli.models import Source, batches, built
from pared.errors import ConfigError, ParedError
from pared.executors.cluster import executor_at
from pared.files.disk import as_path, check_directory, write_atomic
from pared.files.remote.urls import output_at, source_at, url_of
from pared.inspection.page import charts
from pared.inspection.page.drawing import require_library

if TYPE_CHECKING:
    from pared.artifact.outcome import Curve


@app.command()
def fit(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PKG.MOD:FACTORY|FOLDER", help="A function that returns the float model, or a Hugging Face folder."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", parser=path, help="The directory to write to.")
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="PKG.MOD:OBJ|TEXT",
            help="Batches, or a function that calls the model; with a folder also a text, token ids or a dataset.",
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="PKG.MOD:FUNC|TEXT",
            help="A function that scores a model; with a folder also a file of text that it should predict.",
        ),
    ] = None,
    confirm: Annotated[
        str | None,
        typer.Option(metavar="PKG.MOD:FUNC|TEXT", help="The same on other data, to confirm the result."),
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
    max_size: MaxSize = None,
    bits: Annotated[float | None, typer.Option(help="The size as bits per number of the model instead.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="The runtime to fit it for: gguf, compressed-tensors, onnx, ...; its files are written."),
    ] = None,
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
    by_block: Annotated[
        bool,
        typer.Option(
            "--by-block",
            help="Hold one block of a folder's language model in memory at a time, as is done anyway where it is too "
            "large; --workspace holds the rest, or a directory beside the output.",
        ),
    ] = False,
    workers: Workers = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Write the trade-off between bytes, damage and score instead of a model.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate bytes and seconds, and write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress and no report.")] = False,
    verbose: Verbose = False,
) -> None:
    """Compress a model and write it to a directory."""
    show_log(verbose)
    search = pared.fit  # first of all: without torch it says what to install
    with ExitStack() as held:
        place = None if output is None or dry_run else held.enter_context(output_at(output, "-o"))
        if url_of(model) is not None:
            model = str(source_at(model, "pared fit"))
        _check_mode(
            place,
            curve,
            dry_run,
            recorded=(workspace is not None and not by_block and workers is None) or confirm is not None,
        )
        source = Source(model, calib, target, None if curve or dry_run else place)
        criterion = given(
            tolerable_loss=tolerable_loss,
            criterion="absolute" if absolute else None,
            higher_is_better=False if lower_is_better else None,
        )
        conf = pared.PostTrainingQuantConfig(
            accuracy_criterion=pared.AccuracyCriterion(**criterion),
            **given(
                approach=approach,
                quant_level=quant_level,
                max_size=source.size(size(max_size), bits),
                target=target,
                rules=[_rule(text) for text in rule or ()] or None,
                calibration_sampling_size=samples,
                logits=tuple(logits or ()) or None,
                max_trials=max_trials,
                timeout=timeout,
                seed=seed,
                strict=strict or None,
            ),
        )
        if workers is not None and dry_run:
            raise ConfigError(
                "--workers excludes --dry-run",
                where="pared fit",
                remedy="An estimate is of this machine: leave it out.",
            )
        by_block = by_block or workers is not None  # whose tasks are about a block each
        by_block = by_block or (place is not None and calib is not None and source.is_too_large())
        if place is None:
            guess = source.estimate(conf, by_block=by_block)
            typer.echo(
                f"at 8 bits about {guess.nbytes:,} bytes ({guess.nbytes / guess.original_nbytes:.3f} of "
                f"{guess.original_nbytes:,}) and {guess.seconds:.1f} s; a search below 8 bits takes longer and makes "
                "a smaller file; nothing was written"
            )
            return
        if by_block and curve:
            with executor_at(workers, told(quiet)) as executor:
                found = source.trade_off_by_block(conf, source.score(evaluate), workspace, quiet, executor)
            _write_curve(found, place, quiet)
            return
        if by_block:
            scores = source.score(evaluate), source.score(confirm)
            with executor_at(workers, told(quiet)) as executor:
                source.fit_by_block(conf, scores, workspace, place, quiet, executor)
            return
        job = source.model, conf, source.batches(conf.calibration_sampling_size)
        if curve:
            _write_curve(pared.trade_off(*job, source.score(evaluate), quiet=quiet), place, quiet)
        else:
            small = search(*job, source.score(evaluate), source.score(confirm), workspace=workspace, quiet=quiet)
            source.write(small, place, quiet)
    if not quiet and not dry_run:
        tell_sent(output)


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
        check_directory(as_path(output, "-o"))


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
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure again which kernels are fastest on this machine; the model's file is not changed."""
    show_log(verbose)
    tune = pared.tune_speed  # it says what to install where torch is missing
    tuned = tune(directory, built(model), batches(calib))
    if not quiet:
        from pared.runtime.record import record_of  # only now: it needs torch

        typer.echo("\n".join(record_of(tuned).profile.summary()))


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
