"""Who exports a quantized model to which runtime. To add one: a function here, by the target's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import nn

from pared.errors import ConfigError
from pared.model.contents import Contents
from pared.model.tensors import find_tensors
from pared.runtime.exporting.weights import export_weights
from pared.runtime.float_forms import decoded, skeleton_of
from pared.runtime.onnx.capture import Dynamic
from pared.runtime.onnx.export import Exported, export_onnx
from pared.runtime.openvino.export import export_openvino
from pared.targets.table import TARGETS
from pared.targets.target import Target


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be exported.

    Args:
        model: the quantized model.
        contents: what it holds.
        path: as for `pared.export`; so are the others.
    """

    model: nn.Module
    contents: Contents
    path: str | Path
    inputs: Any
    folder: Path | None
    dynamic: Dynamic


Exporter = Callable[[Job], Exported]


def _weights(target: Target, job: Job) -> Exported:
    return export_weights(skeleton_of(job.model), job.contents, target, job.path, job.folder)


def _graph(write: Callable[..., Exported], target: Target, job: Job) -> Exported:
    if job.inputs is None:
        raise ConfigError(
            "the graph is captured from a call, and there are no inputs",
            where=f'export(to="{target.name}")',
            remedy="Pass one batch, as in calib_dataloader: export(model, path, inputs).",
        )
    floats = decoded(find_tensors(skeleton_of(job.model)), job.contents)
    return write(floats, job.contents, job.path, job.inputs, job.dynamic)


_GRAPHS: Final[Mapping[str, Callable[..., Exported]]] = {"onnx": export_onnx, "openvino": export_openvino}

EXPORTERS: Final[Mapping[str, Exporter]] = {
    name: partial(_graph, _GRAPHS[name], target) if target.takes == "graph" else partial(_weights, target)
    for name, target in TARGETS.items()
}
