"""ONNX Runtime: the float graph, its dynamic int8, and static int8 as QDQ, per channel, u8 x s8, MinMax."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from bench.peers.onnx_export import exported
from bench.peers.peer import Peer, Task, run_of_arrays
from bench.peers.subjects.subject import Part, Run


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # it has no types
    """One sample at a time: what a mask adds to padding, the least float, would be the range of its grid."""

    def __init__(self, part: Part) -> None:
        self.calls: Iterator[dict[str, Any]] = (
            {name: x.numpy() for name, x in zip(part.inputs, call, strict=True)} for call in part.singles or part.calls
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self.calls, None)


def _pre_processed(task: Task, file: Path) -> Path:
    """As ONNX Runtime asks for before quantization."""
    ready = file.with_suffix(".ready.onnx")
    try:
        quant_pre_process(file, ready)
    except Exception as error:  # noqa: BLE001  # it raises a plain Exception, and says to do without
        task.notes.append(f"pre-processed without symbolic shapes ({error})")
        quant_pre_process(file, ready, skip_symbolic_shape=True)
    return ready


class Float(Peer):
    settings = "`InferenceSession`"

    def prepare(self, task: Task) -> dict[str, Path]:
        return exported(task)

    def compress(self, task: Task, prepared: dict[str, Path]) -> Any:
        for name, file in prepared.items():
            self.convert(task, name, file, task.folder / f"{name}.onnx")

    def convert(self, task: Task, name: str, file: Path, target: Path) -> None:  # noqa: ARG002  # others need them
        target.write_bytes(file.read_bytes())

    def save(self, task: Task, compressed: Any) -> None:
        """It is written as it is converted."""

    def module(self, task: Task, compressed: Any) -> nn.Module:  # noqa: ARG002  # the files are the model
        return self.reload(task)

    def reload(self, task: Task) -> nn.Module:
        runs = {file.stem: _session(file, task.threads) for file in sorted(task.folder.glob("*.onnx"))}
        return task.subject.joined(runs)


def _session(file: Path, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = tuple(node.name for node in session.get_inputs())
    return run_of_arrays(lambda inputs: session.run(None, inputs), names)


class Dynamic(Float):
    settings = "`quantize_dynamic`, defaults"

    def convert(self, task: Task, name: str, file: Path, target: Path) -> None:  # noqa: ARG002  # for all parts
        quantize_dynamic(_pre_processed(task, file), target)


class Static(Float):
    settings = "`quantize_static`: QDQ, per channel, u8 x s8, MinMax"

    def prepare(self, task: Task) -> Any:
        self.parts = task.subject.parts(task.subject.load())
        return super().prepare(task)

    def convert(self, task: Task, name: str, file: Path, target: Path) -> None:
        quantize_static(
            _pre_processed(task, file),
            target,
            _Reader(self.parts[name]),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )


PEERS: dict[str, Peer] = {"ort-fp32": Float(), "ort-dynamic": Dynamic(), "ort-static": Static()}
