"""`fit` of a Hugging Face folder, one block of its model in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from pared.artifact.outcome import Curve
from pared.checkpoints.folders.sources import check_places
from pared.checkpoints.pretrained import folder as pretrained
from pared.checkpoints.runtimes.conversion import config_of, convert
from pared.errors import ConfigError
from pared.executors.executor import Executor, LocalExecutor
from pared.files.directories.lock import SHORT_WAIT, owned
from pared.files.directories.whole import check_vacant
from pared.files.disk import check_directory, make_directory
from pared.fitting.calibration.logits import known_logits
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.records.fingerprint import claim, recorded
from pared.fitting.search.compressor import provenance
from pared.fitting.search.evaluate import EvalFunc
from pared.fitting.search.search import Judge
from pared.fitting.streamed.deciding.tracing import Tracing
from pared.fitting.streamed.inputs import DEVICE, THREADS, calls_of, fingerprint_of, samples_of
from pared.fitting.streamed.parts.opening import opened
from pared.fitting.streamed.phases import Run
from pared.fitting.streamed.result import Fitted, fitted
from pared.fitting.streamed.store import Store
from pared.fitting.streamed.sweeps import Sweeps
from pared.model import storage
from pared.runtime.profile.profile import ENGINE_FILE, Profile, this_machine
from pared.runtime.saving import DEPLOY
from pared.switches import threads, threads_asked
from pared.targets.table import OWN, TARGETS
from pared.targets.writers import check_described

log = logging.getLogger(__name__)

_NO_CONFIG: Final = "Pass a Hugging Face folder."
_DEVICES: Final[Mapping[str, str]] = {"cpu": "processors", "cuda": "GPUs"}
_ARTIFACT: Final = "artifact"  # of a model for another runtime, in the workspace


def fit_folder(
    folder: Path,
    conf: PostTrainingQuantConfig,
    calibration: Any,
    workspace: Path,
    output: Path,
    *,
    eval_func: EvalFunc | None = None,
    confirm_func: EvalFunc | None = None,
    quiet: bool = False,
    dtype: str = "bfloat16",
    executor: Executor | None = None,
) -> Fitted:
    """Compress the language model of a folder in bounded memory, calibrated.

    What is in memory at a time is one block in float32 with the gradients and second moments of its weights, or the
    embedding and the head; and the hidden states of one sample. While a model is scored it is the codes of one, or one
    block of the float model and the head. All else is in the workspace. After an interruption the same call goes on
    where it stopped, and gives the same bytes.

    Args:
        folder: a Hugging Face folder whose class is in transformers; code in it is never run.
        conf: what is wanted. Inputs of layers stay in float: `approach` is "auto" or "weight_only".
        calibration: batches, as for `fit`, or whatever `pared.calibration` reads, such as the path of a text.
        workspace: a directory for everything that is not in memory, made if it is missing. It may serve for other
            sizes and criteria with the same model, calibration and other options.
        output: the directory of the artifact, to which the folder's other files are copied.
        eval_func: see `fit`.
        confirm_func: see `fit`.
        quiet: True shows no progress.
        dtype: the type of the hidden states in the workspace, "bfloat16" or "float32".
        executor: runs blocks, and traces and rounds tensors; workers have to see the folder and the workspace.

    Returns:
        the artifact, which `pared.load(output, model=...)` and `from_pretrained(output)` read, and how it went.

    Raises:
        ConfigError: an option that needs the whole model, a rule that matches nothing, a size that no file can have; or
            the workspace belongs to another fit.
        FileError: the folder is incomplete, or the disk is full.
        CalibrationError: there is too little text, or it has tokens that the model has not.
        EvaluationError: a function raised, or returned no score.
        WorkerError: a worker does not see the folder or the workspace, or cannot do the work.
        NotInBlocks: the model does not pass a stream through a list of blocks.
    """
    check_options(conf, folder)
    _check_workspace(workspace, folder, output)
    target = None if conf.target == OWN else TARGETS[conf.target]
    check_places(folder, output)
    check_directory(output)
    if target is None:
        pretrained.check_replaceable(output)
    elif not target.by_family:
        check_vacant(output)
    executor = executor or LocalExecutor()
    asked = folder, conf, calibration, workspace, quiet, dtype, executor
    with _opened(*asked) as (run, fingerprint):
        judge = None
        if eval_func is not None:
            criterion = conf.accuracy_criterion
            judge = Judge(criterion, eval_func, confirm_func, conf.max_trials, conf.timeout).over(executor)
        compressor, built = run.built(judge, fingerprint)
        name = type(run.weights.tensors.model).__name__
        place = output if target is None else workspace / _ARTIFACT
        make_directory(place)
        with owned(place, wait=SHORT_WAIT), run.store.phase("writing files", 2 * built.assembly.nbytes, output):
            path = built.assembly.write(place)
            if target is not None:
                return fitted(path, convert(path, output, target.name, folder).files, compressor, built, name)
            found = fitted(path, (path,), compressor, built, name)
            # Nothing was timed, and what stood there was timed for another model.
            for file, content in ((DEPLOY, found.deploy_yaml()), (ENGINE_FILE, Profile(this_machine()).to_json())):
                storage.write_beside(path, file, content)
            pretrained.complete(path, folder, name)
            return found


def trade_off_of(
    folder: Path,
    conf: PostTrainingQuantConfig,
    calibration: Any,
    workspace: Path,
    *,
    eval_func: EvalFunc | None = None,
    quiet: bool = False,
    dtype: str = "bfloat16",
    executor: Executor | None = None,
    points: int = 8,
) -> Curve:
    """What each size would cost; arguments and errors are those of `fit_folder`, and of `pared.trade_off`."""
    check_options(conf, folder)
    _check_workspace(workspace, folder)
    executor = executor or LocalExecutor()
    asked = folder, conf, calibration, workspace, quiet, dtype, executor
    with _opened(*asked) as (run, _):
        judge = None if eval_func is None else Judge(conf.accuracy_criterion, eval_func).over(executor)
        return run.curve(judge, points)


@contextmanager
def _opened(
    folder: Path,
    conf: PostTrainingQuantConfig,
    calibration: Any,
    workspace: Path,
    quiet: bool,
    dtype: str,
    executor: Executor,
) -> Iterator[tuple[Run, dict[str, str]]]:
    """The phases for a folder, and what they depend on; the workspace is owned until the context ends."""
    with opened(folder, conf) as (weights, blocks):
        tensors, listing = weights.tensors, weights.listing
        made = calls_of(calibration, folder, tensors.model, conf.calibration_sampling_size)
        executor.check_files([folder / "config.json", *listing.files.values()])
        make_directory(workspace)
        with owned(workspace):
            executor.check_writes(workspace)
            count = _threads_of(workspace, executor)
            _check_device(workspace, executor)
            fingerprint = fingerprint_of(folder, listing, tensors, conf, made, dtype, count, executor.device)
            claim(workspace, fingerprint)
            store = Store(workspace, {tensor.name: number for number, tensor in enumerate(tensors)})
            logits, inputs = partial(known_logits, wanted=conf.logits), conf.target != OWN
            sweeps = Sweeps(weights, blocks, made, store, conf.seed, logits, dtype, inputs=inputs, executor=executor)
            told = provenance(conf, samples_of(made))
            with threads(count):  # here, too: of the embedding, the head, and all of it without workers
                yield Run(sweeps, Tracing(weights, conf, store), told, quiet), fingerprint


def _threads_of(workspace: Path, executor: Executor) -> int:
    """With how many threads torch computes: as a fit began that goes on here; else as tasks have, or the user.

    Raises:
        ConfigError: it began with another number than tasks have.
    """
    began, asked = recorded(workspace, THREADS), executor.threads or threads_asked()
    if began is None or not began.isdecimal() or began == str(asked):
        return asked
    if executor.threads is not None:
        raise ConfigError(
            f"was begun with {began} threads in each task, on which its bytes depend, and tasks have {asked} now",
            where=str(workspace),
            remedy=f"Pass RayExecutor(cores={began}), leave the workers out, or pass another directory.",
        )
    log.info("%s: goes on with %s threads, as it began, not %d", workspace, began, asked)
    return int(began)


def _check_device(workspace: Path, executor: Executor) -> None:
    """Refuse to go on with a fit on another kind of device.

    Raises:
        ConfigError: its bytes depend on that.
    """
    began, now = recorded(workspace, DEVICE), executor.device
    if began not in (None, now):
        then, now = _DEVICES.get(str(began), began), _DEVICES.get(now, now)
        raise ConfigError(
            f"was begun on {then}, on which its bytes depend, and {now} compute now",
            where=str(workspace),
            remedy="Use workers of the same kind, see RayExecutor(gpus=...), or pass another directory.",
        )


def _check_workspace(workspace: Path, folder: Path, output: Path | None = None) -> None:
    """Refuse a workspace whose files would be taken for those of the model, before or after."""
    place = workspace.resolve()
    if folder.resolve() in (place, *place.parents) or (output is not None and output.resolve() == place):
        raise ConfigError(
            "is the workspace, and is in the model's folder or the output itself",
            where=str(workspace),
            remedy="Pass workspace=..., a directory elsewhere.",
        )


def check_options(conf: PostTrainingQuantConfig, folder: Path) -> None:
    """Refuse what needs the whole model, and a runtime that does not run it.

    Raises:
        ConfigError: the inputs of layers are to be rounded; or the runtime takes a graph, or does not know the folder's
            architecture.
    """
    if conf.target != OWN and TARGETS[conf.target].takes == "graph":
        named = ", ".join(name for name, one in TARGETS.items() if one.takes == "weights")
        raise ConfigError(
            f"target={conf.target!r} needs the graph of the whole model, which is captured in memory",
            where="pared.fit",
            remedy=f"Pass the model itself, or take a target whose files hold tensors by name: {named}.",
        )
    if conf.approach not in ("auto", "weight_only"):
        raise ConfigError(
            f"approach={conf.approach!r} is for a model in memory",
            where="pared.fit",
            remedy='Take approach="weight_only": block by block only weights are rounded.',
        )
    if conf.target != OWN:
        check_described(TARGETS[conf.target], config_of(folder, _NO_CONFIG), folder)
