"""Whether the arguments of `fit` are right, before any work."""

from __future__ import annotations

from pathlib import Path

from pared.errors import CalibrationError, ConfigError
from pared.fitting.config import PostTrainingQuantConfig
from pared.model.calls import Calibration
from pared.runtime.exporting.weights import architecture_of
from pared.targets.families.table import architectures
from pared.targets.installed import check_installed
from pared.targets.table import OWN, TARGETS
from pared.targets.writers import check_described


def check_arguments(
    conf: PostTrainingQuantConfig, calibration: object, eval_func: object = None, confirm_func: object = None
) -> None:
    """Refuse arguments of `fit` that have a wrong type or contradict each other.

    Raises:
        ConfigError: `eval_func` or `confirm_func` has a wrong type, or `confirm_func` stands alone; or the target's
            packages are missing.
        CalibrationError: `approach="static"` without calibration data.
    """
    if conf.target != OWN:
        check_installed(TARGETS[conf.target])
    for name, function in (("eval_func", eval_func), ("confirm_func", confirm_func)):
        if function is not None and not callable(function):
            raise ConfigError(
                f"{name} is a {type(function).__name__}, which cannot be called",
                where="pared.fit",
                remedy=f"Pass a function: {name}(model) returns a number.",
            )
    if confirm_func is not None and eval_func is None:
        raise ConfigError(
            "there is a confirm_func but no eval_func",
            where="pared.fit",
            remedy="Pass eval_func as well.",
        )
    if conf.approach == "static" and calibration is None:
        raise CalibrationError(
            'approach="static" needs calibration data, and there are none',
            where="pared.fit",
            remedy='Pass calib_dataloader, or choose approach="dynamic" or "weight_only".',
        )


def check_described_model(model: object, conf: PostTrainingQuantConfig) -> None:
    """Refuse a model that the writer of the target will refuse: it is told by its configuration.

    Raises:
        ConfigError: it has none, or is of an architecture that the target does not run; or a package is missing.
    """
    target = TARGETS.get(conf.target)
    if target is None or target.takes == "graph":
        return
    check_installed(target)
    config = architecture_of(model, None)
    if not config:
        known = ", ".join(architectures()) if target.by_family else "those of transformers"
        raise ConfigError(
            f"runs architectures that it knows, and a {type(model).__name__} has no configuration that names one",
            where=f"target {target.name!r}",
            remedy=f"Known are {known}. A model of your own with the same tensors can have the configuration as its "
            f"attribute `config`. Targets that hold a graph take every model: "
            f"{', '.join(name for name, one in TARGETS.items() if one.takes == 'graph')}.",
        )
    check_described(target, config, None)


def of_model(where: str, calibration: Calibration | str | Path | None, **given: object) -> Calibration | None:
    """The calibration data for a model: whatever only the path of a folder takes is refused.

    Args:
        where: the function that was called.
        calibration: the calibration data; a path is a text.
        given: options for folders, by their names; None where they were left out.

    Raises:
        ConfigError: something for folders was given.
    """
    named = [name for name, value in given.items() if value is not None]
    if not named and not isinstance(calibration, str | Path):
        return calibration
    named += ["a text for calibration"] if isinstance(calibration, str | Path) else []
    raise ConfigError(
        f"{' and '.join(named)}: for the path of a folder, not for a model",
        where=where,
        remedy="Leave it out, and pass batches; what pared.fit returns is saved with q.save(directory).",
    )
