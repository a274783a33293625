"""The runtimes that models can be written for. To add one: a file with its `Target` and its writer, and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pared.targets.folders import compressed_tensors, gptq, mlx
from pared.targets.gguf import target as gguf
from pared.targets.graphs import onnx, openvino
from pared.targets.target import Target

TARGETS: Final[Mapping[str, Target]] = {
    one.name: one
    for one in (
        gguf.TARGET,
        compressed_tensors.TARGET,
        compressed_tensors.ANY_BITS,
        compressed_tensors.INT8,
        gptq.TARGET,
        gptq.V2,
        mlx.TARGET,
        onnx.TARGET,
        openvino.TARGET,
    )
}
