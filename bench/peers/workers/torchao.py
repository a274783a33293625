"""torchao, eager: int8 weights, with int8 activations or without."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from bench.peers.peer import Peer, Task, loaded


class Torchao(Peer):
    needs = "model class, torchao"

    def __init__(self, config: Any) -> None:
        self.config, self.settings = config, f"`quantize_(model, {config.__name__}())`, eager"

    def compress(self, task: Task, prepared: nn.Module) -> nn.Module:  # noqa: ARG002  # the signature of all peers
        quantize_(prepared, self.config())
        return prepared

    def reload(self, task: Task) -> nn.Module:
        model = task.subject.blank()
        quantize_(model, self.config())
        return loaded(model, task)


PEERS: dict[str, Peer] = {
    "torchao-dynamic": Torchao(Int8DynamicActivationInt8WeightConfig),
    "torchao-weight": Torchao(Int8WeightOnlyConfig),
}
