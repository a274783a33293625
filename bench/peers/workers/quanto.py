"""optimum-quanto: int8 or int4 weights, frozen, in a safetensors file with the map that its documentation asks for."""

from __future__ import annotations

import json
from typing import Any

from optimum.quanto import freeze, qint4, qint8, quantization_map, quantize, requantize
from safetensors.torch import load_file, save_file
from torch import device, nn

from bench.peers.peer import Peer, Task


class Quanto(Peer):
    needs = "model class, quanto"

    def __init__(self, kind: Any) -> None:
        self.kind, self.settings = kind, f"`quantize(model, weights={kind.name})`, `freeze`"

    def compress(self, task: Task, prepared: nn.Module) -> nn.Module:  # noqa: ARG002  # the signature of all peers
        quantize(prepared, weights=self.kind)
        freeze(prepared)
        return prepared

    def save(self, task: Task, compressed: nn.Module) -> None:
        state = {name: tensor.contiguous() for name, tensor in compressed.state_dict().items()}
        save_file(state, task.folder / "model.safetensors")
        (task.folder / "map.json").write_text(json.dumps(quantization_map(compressed)))

    def reload(self, task: Task) -> nn.Module:
        model = task.subject.blank()
        state = load_file(task.folder / "model.safetensors")
        requantize(model, state, json.loads((task.folder / "map.json").read_text()), device("cpu"))
        return model


PEERS: dict[str, Peer] = {"quanto-w8": Quanto(qint8), "quanto-w4": Quanto(qint4)}
