"""What each tensor of a model is to a runtime: by the types of the modules that have it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pared.model.tensors import ModelTensors
from pared.targets.target import Role

Roles = frozenset[Role]


def roles_of(tensors: ModelTensors[nn.Module]) -> Mapping[str, Roles]:
    """The roles of each tensor, by its first name: several where tensors are tied.

    >>> from pared.model.tensors import find_tensors
    >>> tensors = find_tensors(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 2)))
    >>> {name: sorted(roles) for name, roles in roles_of(tensors).items()}
    {'0.weight': ['table'], '1.weight': ['linear'], '1.bias': ['other']}
    """
    table, head = (_told(tensors.model, f"get_{which}_embeddings") for which in ("input", "output"))
    modules = dict(tensors.model.named_modules(remove_duplicate=False))

    def role(name: str) -> Role:
        owner, _, attribute = name.rpartition(".")
        module = modules[owner]
        if attribute != "weight":
            return "other"
        if module is head:
            return "head"
        if isinstance(module, nn.Embedding):
            return "table" if table is None or module is table else "other"  # those of positions stay in floats
        return "linear" if isinstance(module, nn.Linear) or _is_transposed(module) else "other"

    return {tensor.name: frozenset(map(role, tensor.names)) for tensor in tensors}


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is the layer of GPT-2 that is linear, with inputs in dimension 0."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _told(model: nn.Module, method: str) -> nn.Module | None:
    """What a model of transformers says is its table or its head."""
    found = getattr(model, method, None)
    try:
        module = found() if callable(found) else None
    except (NotImplementedError, AttributeError, TypeError):  # it has none
        return None
    return module if isinstance(module, nn.Module) else None
