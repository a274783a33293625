"""Who exports a quantized model to which runtime. To add one: a function here, by the target's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from pared.errors import ConfigError, ModelError
from pared.model.contents import Contents
from pared.model.tensors import find_tensors
from pared.runtime.exporting.weights import export_weights
from pared.runtime.float_forms import decoded, skeleton_of
from pared.runtime.onnx.capture import Dynamic
from pared.runtime.onnx.export import Exported, export_onnx
from pared.runtime.openvino.caches.generating import convertible, export_generating, generates
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
    return write(_floats(job), job.contents, job.path, job.inputs, job.dynamic)


# The runtimes that keep the cache of a language model, whose graph is then written without example inputs.
_GENERATING: Final = frozenset(("openvino",))


def is_written_generating(target: Target, model: nn.Module, folder: Path) -> bool:
    """Whether the model of a Hugging Face folder is written with its cache inside; asked before a fit.

    Args:
        target: the runtime.
        model: it, which need not have numbers.
        folder: the folder.

    Raises:
        ConfigError: it is, but its tokenizer cannot be.
    """
    if target.name not in _GENERATING or not generates(model):
        return False
    convertible(folder)  # once more when it is written: it takes a second, and a fit hours
    return True


def _openvino(target: Target, job: Job) -> Exported:
    if any(stored.coded.dtype == torch.bfloat16 for stored in job.contents.tensors if stored.kind == "parameter"):
        raise ModelError(
            "is a model in bfloat16, which is not written for OpenVINO",
            where=type(job.model).__name__,
            remedy="Fit it in float32: model.float(). OpenVINO computes in bfloat16 if it is told to.",
        )
    if job.inputs is None and generates(job.model):
        return export_generating(_floats(job), job.contents, job.path, job.folder)
    return _graph(export_openvino, target, job)


def _floats(job: Job) -> nn.Module:
    return decoded(find_tensors(skeleton_of(job.model)), job.contents)


_GRAPHS: Final[Mapping[str, Callable[[Target, Job], Exported]]] = {
    "onnx": partial(_graph, export_onnx),
    "openvino": _openvino,
}

EXPORTERS: Final[Mapping[str, Exporter]] = {
    name: partial(_GRAPHS[name] if target.takes == "graph" else _weights, target) for name, target in TARGETS.items()
}
