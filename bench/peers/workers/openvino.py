"""OpenVINO, latency hint: as it comes (it computes in bfloat16 where the processor can), and what NNCF makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nncf
import openvino as ov
from torch import nn

from bench.peers.onnx_export import exported
from bench.peers.peer import Peer, Task, run_of_arrays
from bench.peers.subjects.subject import Part, Run

_GROUP = 64
_Parts = Mapping[str, tuple[Part, Any]]


def _dataset(part: Part) -> Any:
    return nncf.Dataset(part.calls, lambda call: dict(zip(part.inputs, (x.numpy() for x in call), strict=True)))


class AsItComes(Peer):
    settings = "`convert_model`, `save_model` (float16 weights), computes in bfloat16 here"

    def prepare(self, task: Task) -> _Parts:
        parts = task.subject.parts(task.subject.load())
        try:
            return {name: (part, _converted(part)) for name, part in parts.items()}
        except Exception as error:  # noqa: BLE001  # of the converter's own kinds; the other way in is a file
            task.notes.append(f"through ONNX, since convert_model of the module fails: {_brief(error)}")
            files = exported(task)
            return {name: (part, ov.convert_model(files[name])) for name, part in parts.items()}

    def compress(self, task: Task, prepared: _Parts) -> dict[str, Any]:
        return {name: self.convert(task, part, model) for name, (part, model) in prepared.items()}

    def convert(self, task: Task, part: Part, model: Any) -> Any:  # noqa: ARG002  # others need them
        return model

    def save(self, task: Task, compressed: dict[str, Any]) -> None:
        for name, model in compressed.items():
            ov.save_model(model, task.folder / f"{name}.xml")

    def module(self, task: Task, compressed: Any) -> nn.Module:  # noqa: ARG002  # the files are the model
        return self.reload(task)

    def reload(self, task: Task) -> nn.Module:
        runs = {file.stem: _compiled(file, task.threads) for file in sorted(task.folder.glob("*.xml"))}
        return task.subject.joined(runs)


def _converted(part: Part) -> Any:
    model = ov.convert_model(part.module, example_input=part.calls[0])
    for port, name in zip(model.inputs, part.inputs, strict=True):
        port.get_tensor().set_names({name})
    return model


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"


def _compiled(file: Path, threads: int) -> Run:
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = ov.Core().compile_model(file, "CPU", options)
    names = tuple(port.get_any_name() for port in compiled.inputs)
    request = compiled.create_infer_request()

    def infer(inputs: dict[str, Any]) -> list[Any]:
        outputs = request.infer(inputs)
        return [outputs[port] for port in compiled.outputs]

    return run_of_arrays(infer, names)


class Weights8(AsItComes):
    settings = "`nncf.compress_weights(model)`: int8 weights"

    def convert(self, task: Task, part: Part, model: Any) -> Any:  # noqa: ARG002  # it takes no data
        return nncf.compress_weights(model)


class Weights4(AsItComes):
    settings = f"`nncf.compress_weights`: int4 symmetric, groups <= {_GROUP}, all layers, AWQ, scale estimation"

    def convert(self, task: Task, part: Part, model: Any) -> Any:  # noqa: ARG002  # no setting depends on the task
        return nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=_GROUP,
            all_layers=True,
            dataset=_dataset(part),
            awq=True,
            scale_estimation=True,
            subset_size=len(part.calls),
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST  # where a row is no multiple of the groups
            ),
        )


class Int8(AsItComes):
    settings = "`nncf.quantize`: MIXED, TRANSFORMER for transformers"

    def convert(self, task: Task, part: Part, model: Any) -> Any:
        return nncf.quantize(
            model,
            _dataset(part),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER if task.subject.transformer else None,
            subset_size=len(part.calls),
        )


PEERS: dict[str, Peer] = {
    "openvino-bf16": AsItComes(),
    "openvino-w8": Weights8(),
    "openvino-w4": Weights4(),
    "openvino-int8": Int8(),
}
