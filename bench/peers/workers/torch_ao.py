"""Torch's own dynamic int8, with its default layers: Linear, LSTM, GRU."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from bench.peers.peer import Peer, Task, loaded


def _quantized(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is deprecated, and still what most people use
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(model)
    return quantized


class Dynamic(Peer):
    settings = "`torch.ao.quantization.quantize_dynamic(model)`"
    needs = "model class, same recipe"

    def compress(self, task: Task, prepared: nn.Module) -> nn.Module:  # noqa: ARG002  # it has no settings
        return _quantized(prepared)

    def reload(self, task: Task) -> nn.Module:
        return loaded(_quantized(task.subject.blank()), task)


PEERS: dict[str, Peer] = {"torch-dynamic": Dynamic()}
