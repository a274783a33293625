"""Files that hold tensors by name: a quantized model as their writers get it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from pared.checkpoints.runtimes.conversion import config_of
from pared.files.disk import as_path
from pared.formats.coded import Coded, Grid, Grouped, dtype_name, to_array
from pared.formats.groups.grid import GroupGrid, Numbers
from pared.formats.streams import STEPS
from pared.formats.views import first_dimension, matrix_of
from pared.model.contents import Contents, Stored
from pared.model.roles import roles_of
from pared.model.tensors import find_tensors
from pared.runtime.onnx.export import Exported
from pared.targets.conversion import Held, converted
from pared.targets.target import Role, Target
from pared.targets.writers import writer_of


def export_weights(
    skeleton: nn.Module, contents: Contents, target: Target, path: str | Path, folder: Path | None
) -> Exported:
    """Write the files of a runtime that knows the architecture.

    Args:
        skeleton: the float model without numbers, which says what each tensor is.
        contents: the numbers.
        target: the runtime.
        path: as for `pared.export`.
        folder: as for `pared.export`.

    Raises:
        ConfigError: the runtime cannot hold the model exactly, or does not know it.
        FileError: a file cannot be read or written.
    """
    write = writer_of(target.name)
    tensors = find_tensors(skeleton)
    roles = roles_of(tensors)
    wanted = {name: tensor.name for tensor in tensors if tensor.persistent for name in tensor.names}
    held = [
        _held(stored, roles[wanted[stored.name]])
        for stored in contents.tensors
        if stored.name in wanted and stored.decision.treatment != "made"
    ]
    source = converted(held, target, architecture_of(skeleton, folder), folder, contents.provenance)
    files = write(source, as_path(path, "export"))
    nbytes = sum(file.stat().st_size for file in files)
    codes = tuple(one.name for one in source.outlines if one.offer is not None)
    return Exported(files[0] if len(files) == 1 else Path(path), nbytes, {}, {}, codes, {}, {})


def architecture_of(model: object, folder: Path | None) -> Mapping[str, Any]:
    """The configuration of a model of transformers: its folder's, or its own; empty where there is none.

    It names the class that the model is of, which may be another than the checkpoint's: one without its head.

    Raises:
        ConfigError: the folder has none.
        CorruptError: it is not a JSON object.
    """
    if folder is not None:
        return _of_class(model, config_of(folder, "Pass the model's folder."))
    config: Any = getattr(model, "config", None)
    own = config.to_dict() if hasattr(config, "to_dict") else {}
    found: dict[str, Any] = json.loads(json.dumps(own, default=str))
    if own and not found.get("architectures"):
        found["architectures"] = [type(model).__name__]
    return _of_class(model, found)


def _of_class(model: object, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with the class that a model has in transformers."""
    names = [one.__name__ for one in type(model).__mro__ if one.__module__.startswith("transformers.models.")]
    return {**config, "architectures": names[:1]} if config and names else config


def _held(stored: Stored, roles: frozenset[Role]) -> Held:
    coded = stored.coded
    # Models tie their heads to their tables, which are what runtimes know.
    names = tuple(sorted(stored.names, key=lambda name: "embed" not in name)) if "table" in roles else stored.names
    if roles == {"other"} or not isinstance(coded.format, (Grid, Grouped)):
        kind = coded.dtype if "codes" in coded.parts else coded.parts["values"].dtype
        return Held(names, coded.shape, dtype_name(kind), roles, None, (1, 1), partial(_values, coded))
    view = coded.view or first_dimension(coded.shape)
    grid: GroupGrid | Literal["rows"] = coded.format.grid if isinstance(coded.format, Grouped) else "rows"
    matrix = (view.n_rows, view.n_columns)
    return Held(names, coded.shape, dtype_name(coded.dtype), roles, grid, matrix, partial(_parts, coded))


def _values(coded: Coded) -> Mapping[str, Numbers]:
    return {"values": to_array(coded.decode() if "codes" in coded.parts else coded.parts["values"])}


def _parts(coded: Coded) -> Mapping[str, Numbers]:
    parts = {name: to_array(part) for name, part in coded.parts.items()}
    view = coded.view or first_dimension(coded.shape)
    if isinstance(coded.format, Grid):
        parts |= {name: parts[name].reshape(-1) for name in STEPS if name in parts}
    return {**parts, "codes": matrix_of(parts["codes"], view)}
