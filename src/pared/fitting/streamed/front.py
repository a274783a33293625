"""`pared.fit` of a path: what is checked before a folder's model is fitted block by block."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Final

from pared.artifact.outcome import Curve
from pared.errors import ConfigError
from pared.executors.executor import Executor
from pared.files.disk import as_path, reading
from pared.files.remote.urls import source_at, url_of
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.records.fingerprint import is_claimed
from pared.fitting.search.evaluate import EvalFunc
from pared.fitting.streamed.fit import fit_folder, trade_off_of
from pared.fitting.streamed.result import Fitted
from pared.fitting.verification.arguments import check_arguments

log = logging.getLogger(__name__)

_WORKSPACE: Final = ".work"  # after the name of the output: a workspace that nobody chose


def fit_path(
    folder: str | Path,
    conf: PostTrainingQuantConfig,
    calibration: Any,
    functions: tuple[EvalFunc | None, EvalFunc | None],
    workspace: str | Path | None,
    output: str | Path | None,
    quiet: bool,
    executor: Executor | None = None,
) -> Fitted:
    """Fit the model of a folder, see `pared.fit`.

    Without a workspace, one beside the output serves, and is deleted at the end.

    Raises:
        ConfigError: an argument is missing, or needs the whole model in memory.
        ParedError: as `fit_folder`.
    """
    check_arguments(conf, calibration, *functions)
    chosen = workspace
    if workspace is None and output is not None:
        beside = as_path(output, "output").absolute()
        workspace = beside.with_name(f"{beside.name}{_WORKSPACE}")
        _check_ours(workspace)
        log.warning("until the fit is done, what is not in memory is in %s", workspace)
    place = _checked("pared.fit", calibration, workspace)
    eval_func, confirm_func = functions
    found = fit_folder(
        source_at(folder, "model"),
        conf,
        calibration,
        place,
        place / "model" if output is None else as_path(output, "output"),
        eval_func=eval_func,
        confirm_func=confirm_func,
        quiet=quiet,
        executor=executor,
    )
    if chosen is None:
        shutil.rmtree(place)
    return found


def _check_ours(workspace: Path) -> None:
    """Refuse a directory that will be deleted and holds anything but what a fit that was interrupted left there."""
    with reading(workspace):
        is_foreign = workspace.exists() and not is_claimed(workspace) and any(workspace.iterdir())
    if is_foreign:
        raise ConfigError(
            "is where the workspace would be, and holds something else",
            where=str(workspace),
            remedy="Move it away, or pass workspace=..., a directory.",
        )


def trade_off_path(
    folder: str | Path,
    conf: PostTrainingQuantConfig,
    calibration: Any,
    eval_func: EvalFunc | None,
    workspace: str | Path | None,
    quiet: bool,
    executor: Executor | None,
    points: int,
) -> Curve:
    """What each size of a folder's model would cost, see `pared.trade_off`.

    Raises:
        ConfigError: an argument is missing, or needs the whole model in memory.
        ParedError: as `fit_folder`.
    """
    check_arguments(conf, calibration, eval_func)
    place = _checked("pared.trade_off", calibration, workspace)
    given = source_at(folder, "model"), conf, calibration, place
    return trade_off_of(*given, eval_func=eval_func, quiet=quiet, executor=executor, points=points)


def _checked(where: str, calibration: Any, workspace: str | Path | None) -> Path:
    """The workspace, if there are calibration data, too."""
    if calibration is None:
        raise ConfigError(
            "there are no calibration data",
            where=where,
            remedy="Pass the path of a text, or batches; without them pared.compress rounds a folder.",
        )
    if workspace is None:
        raise ConfigError(
            "a folder's model is measured block by block, for which a workspace is needed",
            where=where,
            remedy="Pass workspace=..., a directory on a disk with space for about three times the model; pared.fit "
            "with output=... makes one beside that.",
        )
    if url_of(workspace) is not None:
        raise ConfigError(
            "is a URL, and in a workspace files replace others in one step, and are locked",
            where=f"workspace={str(workspace)!r}",
            remedy="Pass a directory that all nodes mount (NFS, Lustre, a volume); model and output may be URLs.",
        )
    return as_path(workspace, "workspace")
