"""Who writes for which runtime: imported when it is used, since some need packages of their own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pared.targets.folders.folder import check_config, check_orientation
from pared.targets.installed import check_installed
from pared.targets.pieces import Source
from pared.targets.table import TARGETS
from pared.targets.target import Target

Writer = Callable[[Source, Path], list[Path]]

# By the target's name: a module, and its function.
WRITERS: Final[Mapping[str, tuple[str, str]]] = {
    "gguf": ("pared.targets.gguf.write", "write"),
    "compressed-tensors": ("pared.targets.folders.compressed_tensors", "write"),
    "compressed-tensors-any": ("pared.targets.folders.compressed_tensors", "write_any_bits"),
    "compressed-tensors-int8": ("pared.targets.folders.compressed_tensors", "write_int8"),
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


def check_described(target: Target, config: Mapping[str, Any], folder: Path | None) -> None:
    """Refuse, before any work, a model whose configuration or tokenizer its writer will refuse.

    Args:
        target: a runtime that takes weights by name.
        config: the content of config.json.
        folder: where the tokenizer is.

    Raises:
        ConfigError: the runtime does not run such a model.
        FileError: a file cannot be read.
    """
    if not target.by_family:
        check_config(config, folder, target)
        check_orientation(config, target)
    check = getattr(importlib.import_module(WRITERS[target.name][0]), "check", None)
    if check is not None:
        check(config, folder)


def size_of(name: str) -> Callable[[Source], int] | None:
    """The function that says how many bytes the files will have, where that is known before they are written."""
    found: Callable[[Source], int] | None = getattr(importlib.import_module(WRITERS[name][0]), "nbytes", None)
    return found
