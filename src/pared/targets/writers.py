"""Who writes for which runtime: imported when it is used, since some need packages of their own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from pared.targets.installed import check_installed
from pared.targets.pieces import Source
from pared.targets.table import TARGETS

Writer = Callable[[Source, Path], list[Path]]

# By the target's name: a module, and its function.
WRITERS: Final[Mapping[str, tuple[str, str]]] = {
    "gguf": ("pared.targets.gguf.write", "write"),
    "compressed-tensors": ("pared.targets.folders.compressed_tensors", "write"),
    "compressed-tensors-any": ("pared.targets.folders.compressed_tensors", "write"),
    "compressed-tensors-int8": ("pared.targets.folders.compressed_tensors", "write"),
    "gptq": ("pared.targets.folders.gptq", "write"),
    "gptq_v2": ("pared.targets.folders.gptq", "write_v2"),
    "mlx": ("pared.targets.folders.mlx", "write"),
}


def writer_of(name: str) -> Writer:
    """The function that writes a model for a target: `writer(source, path)` returns the files with weights.

    Raises:
        ConfigError: a package that it needs is not installed.
    """
    check_installed(TARGETS[name])
    module, function = WRITERS[name]
    found: Writer = getattr(importlib.import_module(module), function)
    return found


def size_of(name: str) -> Callable[[Source], int] | None:
    """The function that says how many bytes the files will have, where that is known before they are written."""
    found: Callable[[Source], int] | None = getattr(importlib.import_module(WRITERS[name][0]), "nbytes", None)
    return found
