"""Whether the packages are there that a target needs."""

from __future__ import annotations

from importlib.util import find_spec

from pared.errors import ConfigError
from pared.targets.target import Target


def check_installed(target: Target) -> None:
    """Refuse a target whose packages are missing.

    Raises:
        ConfigError: one is not installed.
    """
    missing = [package for package in target.packages if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"needs {' and '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed",
            where=f"target {target.name!r}",
            remedy=f"pip install 'pared[{target.extra}]'",
        )
