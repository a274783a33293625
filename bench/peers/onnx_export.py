"""Float ONNX graphs of a model's parts."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

from bench.peers.peer import Task, dynamic_shapes
from bench.peers.subjects.subject import Part


def exported(task: Task) -> dict[str, Path]:
    """One file per part, below `task.work`."""
    files = {}
    for name, part in task.subject.parts(task.subject.load()).items():
        files[name] = task.work / f"{name}.onnx"
        with contextlib.redirect_stdout(sys.stderr):
            _export(part, files[name])
    return files


def _export(part: Part, file: Path) -> None:
    torch.onnx.export(
        part.module,
        part.calls[0],
        file,
        input_names=list(part.inputs),
        output_names=list(part.outputs),
        dynamic_shapes=dynamic_shapes(part),
        dynamo=True,
        external_data=False,
    )
