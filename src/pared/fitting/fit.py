"""The verbs `fit` and `trade_off`: from a float model to a quantized one, step by step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Final, overload

from torch import nn

from pared.artifact.outcome import Curve
from pared.errors import reason_of
from pared.executors.executor import Executor
from pared.files.directories.lock import owned
from pared.files.disk import as_path, make_directory
from pared.files.remote.urls import output_at, written_at
from pared.fitting.config import PostTrainingQuantConfig, configured
from pared.fitting.eight_bits import MOST_LOST_WITH_INPUTS, at_eight_bits
from pared.fitting.finishing.finish import finished, verify
from pared.fitting.measured.repair import Corrections, Refiner
from pared.fitting.measured.yardstick import Yardstick
from pared.fitting.preparation import Prepared, prepare
from pared.fitting.search import search
from pared.fitting.search import trade_off as curve
from pared.fitting.search.compressor import DEFAULT_DAMAGE, RESERVE_WITHOUT_SCORES, Compressor
from pared.fitting.search.evaluate import EvalFunc
from pared.fitting.search.workspace import Workspace, fingerprint
from pared.fitting.streamed.front import fit_path, trade_off_path
from pared.fitting.timing.threads import suited
from pared.fitting.verification.arguments import check_described_model, of_model
from pared.model import calls
from pared.model.tensors import ModuleT, tensor_count
from pared.runtime.record import record_of
from pared.scalars import checked_number
from pared.switches import random_states_kept, rare_collections
from pared.targets.table import OWN
from pared.terminal import Stages

log = logging.getLogger(__name__)

_CORRECTIONS: Final = "corrections"  # the name of their record in a workspace


@overload
def fit(
    model: ModuleT,
    conf: PostTrainingQuantConfig | None = None,
    calib_dataloader: calls.Calibration | None = None,
    eval_func: EvalFunc | None = None,
    confirm_func: EvalFunc | None = None,
    *,
    workspace: str | Path | None = None,
    quiet: bool = False,
) -> ModuleT: ...


@overload
def fit(
    model: str | Path,
    conf: PostTrainingQuantConfig | None = None,
    calib_dataloader: calls.Calibration | str | Path | None = None,
    eval_func: EvalFunc | None = None,
    confirm_func: EvalFunc | None = None,
    *,
    workspace: str | Path | None = None,
    output: str | Path | None = None,
    quiet: bool = False,
    executor: Executor | None = None,
) -> Path: ...


@random_states_kept()
def fit(
    model: ModuleT | str | Path,
    conf: PostTrainingQuantConfig | None = None,
    calib_dataloader: calls.Calibration | str | Path | None = None,
    eval_func: EvalFunc | None = None,
    confirm_func: EvalFunc | None = None,
    *,
    workspace: str | Path | None = None,
    output: str | Path | None = None,
    quiet: bool = False,
    executor: Executor | None = None,
) -> ModuleT | Path:
    """Compress a model: to the smallest file that keeps its accuracy, or to the most accurate one of a size.

    What you give decides what you get. Damage is the expected share of the output's energy that is lost.

    | given | result |
    |---|---|
    | only `calib_dataloader` | the smallest file with a damage of 0.001; `quant_level=0`: 8 bits everywhere |
    | nothing | 8 bits everywhere |
    | `max_size` | the file of at most that size with the least predicted damage |
    | `eval_func` | the smallest file that meets the criterion; `quant_level=0`: with nothing coarser than 8 bits |
    | both | the smallest file that meets it; if that exceeds `max_size`, the best within it, and `met` is False |

    Args:
        model: a float model on the CPU. It is left exactly as it is. Or the path of a Hugging Face folder, whose model
            is then in memory one block at a time; of a URL ("s3://...") the files are copied here first.
        conf: what you want; default: `PostTrainingQuantConfig()`.
        calib_dataloader: an iterable of batches, read once, where a batch is a tensor, a tuple or list of arguments, or
            a dict of keyword arguments; or a function that gets the model and calls it. The calls show what errors
            cost. No labels are needed. Without calibration data the relative errors of all tensors count alike, and
            all layers run in float unless you ask for `approach="dynamic"`.
        eval_func: a function that gets a model and returns its score: a number, or one number per sample (four or more,
            one-dimensional). It scores the float model, each trial, and the result once more if something other than
            its modules is fastest. With one number per sample the search uses the even samples, and the odd ones
            confirm the result: within the tolerable loss, give or take two standard errors, and within it on all
            samples together.
        confirm_func: like `eval_func`, on other data, which then confirm the result instead of the odd samples.
        workspace: a directory for the records of the search. After an interruption the same call continues from there.
            One search at a time may use it. Of a folder, everything that is not in memory is here; default: beside
            the output, until the fit is done.
        output: the directory of the artifact; default: `model` in the workspace. Or a URL where nothing is: the files
            are sent there when all are written.
        quiet: True shows no progress. Otherwise it is shown at a terminal.
        executor: for a folder, `pared.RayExecutor(...)`: workers on many machines, which see the folder and the
            workspace at the same paths. Default: this machine.

    Returns:
        the quantized model, of a subclass of your model's class, in eval mode and with frozen parameters. `q.pared`
        tells how it went (`met`, `score`, `baseline`, `trials`), `q.report()` what became of each tensor, and
        `q.save(directory)` writes it. Ctrl-C during a search returns the best model so far. Of a folder, the path of
        the artifact.

    Raises:
        ModelError: the model cannot be compressed: it is lazy, scripted, compiled, quantized already, on the meta
            device, or has NaN or infinity in its weights.
        ConfigError: a rule matches nothing, options contradict each other, no file can be as small as `max_size`, or
            the workspace belongs to another search.
        FileError: the workspace cannot be read or written, or another run is using it.
        CalibrationError: the calibration data are missing, empty, ambiguous, or do not fit the model's `forward`.
        EvaluationError: `eval_func` or `confirm_func` raised an exception, or returned something that is not a score.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> small = fit(net, calib_dataloader=[torch.randn(16, 64)])
    >>> small.state_dict()["0.weight"].dtype, isinstance(small, nn.Sequential)
    (torch.int8, True)
    """
    conf = configured(conf)
    if isinstance(model, str | Path):
        functions = eval_func, confirm_func
        with ExitStack() as held:
            place = None if output is None else held.enter_context(output_at(output, "output"))
            found = fit_path(model, conf, calib_dataloader, functions, workspace, place, quiet, executor)
        return found.path if output is None else written_at(output, found.path)
    calibration = of_model("pared.fit", calib_dataloader, output=output, executor=executor)
    check_described_model(model, conf)
    directory = None if workspace is None else as_path(workspace, "workspace")
    with ExitStack() as held:
        if directory is not None and eval_func is not None:  # before hours of work, not after
            make_directory(directory)
            held.enter_context(owned(directory))
        held.enter_context(suited(model))
        held.enter_context(rare_collections(tensor_count(model) if isinstance(model, nn.Module) else 0))
        return _fit(model, conf, calibration, (eval_func, confirm_func), directory, Stages(quiet=quiet))


def _fit(
    model: ModuleT,
    conf: PostTrainingQuantConfig,
    calib_dataloader: calls.Calibration | None,
    functions: tuple[EvalFunc | None, EvalFunc | None],
    directory: Path | None,
    stages: Stages,
) -> ModuleT:
    """What `fit` does, with checked options, in a directory that it owns."""
    eval_func, confirm_func = functions
    eight_bits = conf.quant_level == 0 and conf.max_size is None and eval_func is None
    # First what errors cost, in each weight and each layer's input.
    known = prepare(model, conf, calib_dataloader, functions, stages, eight_bits=eight_bits)
    refiner = _refiner(known.without_moments())
    if eight_bits or (calib_dataloader is None and conf.max_size is None and eval_func is None):
        with stages.stage("rounding weights"):
            make = partial(at_eight_bits, known) if conf.target == OWN else _at_eight_bits_elsewhere(known)
            found, corrections = _repaired(refiner, make, MOST_LOST_WITH_INPUTS)
        return finished(found, known, stages, refiner, corrections)
    # Then what each tensor could become, with bytes and damage.
    compressor = _compressor(known, stages, obey=eval_func is None)
    known = known.without_moments()  # they are freed
    if eval_func is None:
        with stages.stage("rounding weights"):
            found, corrections = _repaired(
                refiner, lambda c: _planned(compressor.corrected(c.factors, c.inputs), known)
            )
            record_of(found).curve = _traced(compressor.corrected(corrections.factors, corrections.inputs))
        return finished(found, known, stages, refiner, corrections)
    # With a score, which damage just meets the criterion.
    records = None
    if directory is not None:
        records = Workspace(directory, fingerprint(known.tensors, conf, known.seen, confirmed=confirm_func is not None))
    judge = search.Judge(conf.accuracy_criterion, eval_func, confirm_func, conf.max_trials, conf.timeout)
    start = compressor.most if conf.quant_level == 0 else DEFAULT_DAMAGE
    corrections = Corrections()
    if refiner is not None:  # once more, of all tensors together, where the search begins
        corrections = _corrections(refiner, compressor, start, known, stages, records)
        compressor = compressor.corrected(corrections.factors, corrections.inputs)
    with stages.stage("scoring the float model"):
        references = search.References.of(compressor, judge, records)
    return _searched(
        lambda: search.search(
            compressor,
            judge,
            max_size=_max_size(conf),
            references=references,
            workspace=records,
            start=start,
        ),
        compressor,
        lambda found: finished(
            found, known, stages, refiner, corrections, lambda candidate: search.judged(candidate, judge, references)
        ),
        stages,
    )


def _refiner(known: Prepared[ModuleT]) -> Refiner[ModuleT] | None:
    """What measures and repairs results; None without calibration data."""
    if known.seen is None or known.sensitivity is None:
        return None
    yardstick = Yardstick(known.tensors.model, known.seen, known.conf.seed)
    free = known.conf.approach == "auto"
    return Refiner(known.tensors, known.seen, known.sensitivity, yardstick, may_keep_inputs=free)


def _repaired(
    refiner: Refiner[ModuleT] | None,
    make: Callable[[Corrections], ModuleT],
    most_of_output: float = math.inf,
) -> tuple[ModuleT, Corrections]:
    """What `make` makes, repaired where that can be measured."""
    if refiner is None:
        return make(Corrections()), Corrections()
    return refiner.repaired(make, most_of_output)


def _corrections(
    refiner: Refiner[ModuleT],
    compressor: Compressor[ModuleT],
    start: float,
    known: Prepared[ModuleT],
    stages: Stages,
    records: Workspace | None,
) -> Corrections:
    """What measurement corrects where a search begins; of a search that goes on, what it has recorded."""
    noted = records.noted(_CORRECTIONS) if records is not None else None
    if noted is not None:
        return Corrections(**noted)
    first, found = refiner.repaired(lambda c: _at(compressor.corrected(c.factors, c.inputs), start), scored=True)
    verify(first, known, stages)  # before hours of work, not after
    if records is not None:
        records.note(_CORRECTIONS, asdict(found))
    return found


def _at_eight_bits_elsewhere(known: Prepared[ModuleT]) -> Callable[[Corrections], ModuleT]:
    """Makes the model in the coarsest formats of another runtime that have 8 bits."""
    compressor = Compressor(known.tensors, replace(known.conf, quant_level=0), known.seen, known.sensitivity)

    def make(corrections: Corrections) -> ModuleT:
        corrected = compressor.corrected(corrections.factors, corrections.inputs)
        return corrected.build(corrected.at_damage(corrected.most))

    return make


def _at(compressor: Compressor[ModuleT], damage: float) -> ModuleT:
    """The model at a damage, or the nearest that the compressor reaches."""
    return compressor.build(compressor.at_damage(min(max(damage, compressor.least), compressor.most)))


def _max_size(conf: PostTrainingQuantConfig) -> int | None:
    assert conf.max_size is None or isinstance(conf.max_size, int)  # the configuration has parsed it
    return conf.max_size


def _compressor(known: Prepared[ModuleT], stages: Stages, *, obey: bool) -> Compressor[ModuleT]:
    with stages.stage("measuring what steps cost"):
        return Compressor(known.tensors, known.conf, known.seen, known.sensitivity, obey=obey)


def _planned(compressor: Compressor[ModuleT], known: Prepared[ModuleT]) -> ModuleT:
    """The model of a size, or else of the default damage: nothing is evaluated."""
    max_size = _max_size(known.conf)
    if max_size is not None:
        point = compressor.within_bytes(max_size, RESERVE_WITHOUT_SCORES)
    else:
        if compressor.least > DEFAULT_DAMAGE:
            log.warning("no formats do less damage than %.2g of the output's energy", compressor.least)
        point = compressor.at_damage(max(DEFAULT_DAMAGE, compressor.least))
    return compressor.build(point)


def _traced(compressor: Compressor[ModuleT]) -> Curve | None:
    """The curve of a model that is found already: it is kept if the curve fails."""
    try:
        return curve.trace(compressor)
    except Exception as error:  # noqa: BLE001  # whatever it is, a curve is not worth a finished search
        log.warning("there is no trade-off curve: %s", reason_of(error))
        return None


def _searched(
    find: Callable[[], ModuleT],
    compressor: Compressor[ModuleT],
    finish: Callable[[ModuleT], ModuleT],
    stages: Stages,
) -> ModuleT:
    """What a search finds, with its curve and in its fastest form; Ctrl-C leaves out what is not done yet."""
    found: ModuleT | None = None
    try:
        with stages.stage("searching"):
            found = find()
        record = record_of(found)
        record.curve = (_traced(compressor) or Curve(())).scored(record.outcome)
        return finish(found)
    except KeyboardInterrupt:
        if found is None:
            raise
        record = record_of(found)
        record.curve = record.curve or Curve(()).scored(record.outcome)  # at least the trials
        log.warning("interrupted: the model is returned without its remaining measurements")
        return found


@random_states_kept()
def trade_off(
    model: nn.Module | str | Path,
    conf: PostTrainingQuantConfig | None = None,
    calib_dataloader: calls.Calibration | str | Path | None = None,
    eval_func: EvalFunc | None = None,
    *,
    points: int = 8,
    workspace: str | Path | None = None,
    quiet: bool = False,
    executor: Executor | None = None,
) -> Curve:
    """What each file size would cost: bytes against damage, and against the score if there is an `eval_func`.

    Args:
        model: a float model on the CPU, which is left exactly as it is; or the path of a Hugging Face folder, whose
            model is then in memory one block at a time.
        conf: as for `fit`; `accuracy_criterion`, `max_size`, `max_trials` and `timeout` have no effect.
        calib_dataloader: as for `fit`.
        eval_func: as for `fit`. With it each point's model is built and scored; without it nothing is built, and the
            bytes are estimates.
        points: the number of points, at least 1, evenly spaced in the logarithm of the damage from 1e-5 to 0.1 as far
            as the model allows; fewer where neighbours are equal. Default 8.
        workspace: for a folder, and needed there: a directory for everything that is not in memory. A fit with the same
            workspace, model and calibration uses what was measured for the curve.
        quiet: True shows no progress. Otherwise it is shown at a terminal.
        executor: as for `fit`.

    Returns:
        the curve: `curve.points` from the largest file to the smallest; `print(curve)` shows a table,
        `curve.to_svg()` a picture. Ctrl-C ends it with the points so far.

    Raises:
        ParedError: as `fit` does.

    >>> import torch
    >>> found = trade_off(nn.Linear(64, 64), calib_dataloader=[torch.randn(16, 64)], points=3)
    >>> [a.nbytes > b.nbytes for a, b in zip(found.points, found.points[1:])]
    [True, True]
    """
    conf = configured(conf)
    points = checked_number("pared.trade_off", "points", points, least=1, whole=True)
    if isinstance(model, str | Path):
        return trade_off_path(model, conf, calib_dataloader, eval_func, workspace, quiet, executor, points)
    calibration = of_model("pared.trade_off", calib_dataloader, workspace=workspace, executor=executor)
    check_described_model(model, conf)
    stages = Stages(quiet=quiet)
    with suited(model):
        known = prepare(model, conf, calibration, (eval_func, None), stages)
    judge = search.Judge(conf.accuracy_criterion, eval_func) if eval_func is not None else None
    compressor = _compressor(known, stages, obey=eval_func is None)
    with stages.stage("tracing"):
        return curve.trace(compressor, judge, points=points)
