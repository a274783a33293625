"""Intel Neural Compressor 3.10 for PyTorch: static int8 of an exported graph, and int4 weights by rounding."""

from __future__ import annotations

from typing import Any

from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import RTNConfig, convert, get_default_static_config, load, prepare
from torch import nn

from bench.peers.peer import Peer, Task, dynamic_shapes, run_of
from bench.peers.subjects.subject import Part


class Static(Peer):
    settings = "`export`, `prepare(get_default_static_config())`, calibrate, `convert`; eager"

    def prepare(self, task: Task) -> Any:
        parts = task.subject.parts(task.subject.load())
        return {name: (part, _graph(part)) for name, part in parts.items()}

    def compress(self, task: Task, prepared: Any) -> Any:  # noqa: ARG002  # the signature of all peers
        converted = {}
        for name, (part, graph) in prepared.items():
            observed = prepare(graph, get_default_static_config())
            for call in part.calls:
                observed(*call)
            converted[name] = (part, convert(observed))
        return converted

    def save(self, task: Task, compressed: Any) -> None:
        for name, (part, graph) in compressed.items():
            graph.save(example_inputs=part.calls[0], output_dir=str(task.folder / name))

    def module(self, task: Task, compressed: Any) -> nn.Module:
        return task.subject.joined({name: run_of(graph) for name, (_, graph) in compressed.items()})

    def reload(self, task: Task) -> nn.Module:
        folders = sorted(folder for folder in task.folder.iterdir() if folder.is_dir())
        return task.subject.joined({folder.name: run_of(load(str(folder))) for folder in folders})


def _graph(part: Part) -> Any:
    return export(part.module, example_inputs=part.calls[0], dynamic_shapes=dynamic_shapes(part, named=False))


def _nameless(model: nn.Module) -> nn.Module:
    """Of a model whose configuration has a name, it asks a hub for files."""
    if hasattr(model, "config"):
        model.config._name_or_path = ""
        model.name_or_path = ""
    return model


class RoundToNearest(Peer):
    settings = "`RTNConfig()`: int4 weights of Linear, groups of 32"
    needs = "model class"

    def prepare(self, task: Task) -> Any:
        return _nameless(task.subject.load())

    def compress(self, task: Task, prepared: nn.Module) -> Any:  # noqa: ARG002  # it takes no data
        return convert(prepare(prepared, RTNConfig()))

    def save(self, task: Task, compressed: Any) -> None:
        compressed.save(str(task.folder))

    def reload(self, task: Task) -> nn.Module:
        task.notes.append("`load` fills quantized layers only; all others stay as the given model has them")
        model: nn.Module = load(str(task.folder), original_model=_nameless(task.subject.blank()))
        return model


PEERS: dict[str, Peer] = {"inc3-static": Static(), "inc3-rtn4": RoundToNearest()}
