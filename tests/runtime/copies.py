"""Every way to copy a model."""

import copy
import io
import pickle
from collections.abc import Callable

import torch
from torch import nn


def copies() -> dict[str, Callable[[nn.Module], nn.Module]]:
    def torch_saved(model: nn.Module) -> nn.Module:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded: nn.Module = torch.load(buffer, weights_only=False)
        return loaded

    return {
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "torch.save": torch_saved,
        "twice": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(model)))),
    }
