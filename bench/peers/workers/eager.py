"""Torch by itself: FP32, and the model in bfloat16, which any user gets for nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bench.peers.peer import Peer, Task, loaded
from bench.peers.subjects.subject import Subject


def _half(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


def _hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_half, arguments)), {name: _half(value) for name, value in named.items()}


def halved(model: nn.Module, subject: Subject) -> nn.Module:
    """The model in bfloat16, which takes float32."""
    model = model.bfloat16()
    for entry in subject.entries(model):
        entry.register_forward_pre_hook(_hook, with_kwargs=True)
    return model


class Float32(Peer):
    settings = "eager"
    needs = "model class"

    def compress(self, task: Task, prepared: nn.Module) -> nn.Module:  # noqa: ARG002  # the other needs it
        return prepared

    def reload(self, task: Task) -> nn.Module:
        return loaded(task.subject.blank(), task)


class Bfloat16(Float32):
    settings = "`model.bfloat16()`, eager"

    def compress(self, task: Task, prepared: nn.Module) -> nn.Module:
        return halved(prepared, task.subject)

    def reload(self, task: Task) -> nn.Module:
        return loaded(halved(task.subject.blank(), task.subject), task)


PEERS: dict[str, Peer] = {"fp32": Float32(), "bf16": Bfloat16()}
