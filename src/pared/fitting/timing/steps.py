"""Calls with caches, made again and again without copying what is in the caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pared.model.calls import Call
from pared.runtime.graphs.containers import container_of, renewed


class Step(Call):
    """A call whose caches are made again for each run, of the same tensors: copying these may take longer than it.

    Nothing but caches may be written to, as a graph shows that can be made of it.
    """

    def on(self, model: Callable[..., Any]) -> Any:
        """The output of a model, or of whatever stands for it."""
        return model(*map(renewed, self.args), **{name: renewed(one) for name, one in self.kwargs.items()})


def has_containers(call: Call) -> bool:
    """Whether an argument holds tensors."""
    return any(container_of(argument) is not None for argument in (*call.args, *call.kwargs.values()))


def tensors_given(call: Call) -> list[Tensor]:
    """The arguments that are tensors, and then the tensors that the others hold."""
    arguments = (*call.args, *call.kwargs.values())
    held = [one for one in map(container_of, arguments) if one is not None]
    found = [argument for argument in arguments if isinstance(argument, Tensor)]
    return [*found, *(tensor for one in held for tensor in one.tensors.values())]


def numbers_given(call: Call) -> int:
    """How many numbers the arguments hold."""
    return sum(tensor.numel() for tensor in tensors_given(call))
