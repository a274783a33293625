"""pared: the smallest, fastest PyTorch model that keeps the accuracy you asked for.

Importing this package does not import torch: its names are fetched when they are first used. `inspect`, `compress`,
`expand` and `compare` work on files without torch; whatever takes a model says what to install (`pared[torch]`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pared.version import __version__

if TYPE_CHECKING:
    from pared.api import fit, load, trade_off, tune_speed
    from pared.comparison import Comparison
    from pared.compression.checkpoint import compress
    from pared.compression.expansion import expand
    from pared.config import AccuracyCriterion, PostTrainingQuantConfig, Rule
    from pared.contrast import compare
    from pared.errors import (
        CalibrationError,
        ConfigError,
        CorruptError,
        EvaluationError,
        FileError,
        MismatchError,
        ModelError,
        ParedError,
        UnsafeError,
        VersionError,
    )
    from pared.ledger import Ledger, Row, inspect
    from pared.model import export, report, save
    from pared.registration import register

_HOMES = {
    "pared.api": ("fit", "load", "trade_off", "tune_speed"),
    "pared.compression.checkpoint": ("compress",),
    "pared.compression.expansion": ("expand",),
    "pared.forecast": ("Estimate", "estimate"),
    "pared.comparison": ("Comparison",),
    "pared.contrast": ("compare",),
    "pared.config": ("AccuracyCriterion", "PostTrainingQuantConfig", "Rule"),
    "pared.errors": (
        "CalibrationError",
        "ConfigError",
        "CorruptError",
        "EvaluationError",
        "FileError",
        "MismatchError",
        "ModelError",
        "ParedError",
        "UnsafeError",
        "VersionError",
    ),
    "pared.ledger": ("Ledger", "Row", "inspect"),
    "pared.model": ("export", "report", "save"),
    "pared.registration": ("register",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AccuracyCriterion",
    "CalibrationError",
    "Comparison",
    "ConfigError",
    "CorruptError",
    "Estimate",
    "EvaluationError",
    "FileError",
    "Ledger",
    "MismatchError",
    "ModelError",
    "ParedError",
    "PostTrainingQuantConfig",
    "Row",
    "Rule",
    "UnsafeError",
    "VersionError",
    "__version__",
    "compare",
    "compress",
    "estimate",
    "expand",
    "export",
    "fit",
    "inspect",
    "load",
    "register",
    "report",
    "save",
    "trade_off",
    "tune_speed",
]


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module, at its first use.

    Raises:
        AttributeError: there is no such name.
        ConfigError: it needs torch, which is not installed.
    """
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pared' has no attribute {name!r}")
    try:
        home = importlib.import_module(_HOME_OF[name])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise _without_torch(name) from error
    value = getattr(home, name)
    globals()[name] = value
    return value


def _without_torch(name: str) -> ParedError:
    from pared.errors import ConfigError  # not at the top: it is a public name, and those are fetched below

    return ConfigError(
        "needs torch, which is not installed",
        where=f"pared.{name}",
        remedy="pip install 'pared[torch]' (inspect, compress, expand and compare work on files without it)",
    )


def __dir__() -> list[str]:
    return __all__
