"""The float model as a whole, for those who call it: one block of it is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import nn

from pared.fitting.streamed.parts.blocks import ModelBlocks
from pared.fitting.streamed.parts.chain import standing
from pared.fitting.streamed.parts.weights import Weights

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def running(weights: Weights, blocks: ModelBlocks) -> Iterator[nn.Module]:
    """The model, whose blocks read their weights from the checkpoint whenever they run.

    What is around the blocks is in memory until the context ends; of a large table, only rows that are looked up.

    Args:
        weights: those of the model.
        blocks: how it is divided.
    """
    model = weights.tensors.model
    modules = [model.get_submodule(name) for name in blocks.names]
    with weights.hollow() as held, held.around(blocks.outside):

        def reading(number: int) -> Callable[..., Any]:
            own = modules[number].forward

            def run(*args: Any, **kwargs: Any) -> Any:
                with held.loaded(blocks.tensors[number]):
                    return own(*args, **kwargs)

            return run

        with standing(modules, [reading(number) for number in range(len(modules))]), _as_it_was(model):
            yield model


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo what callers did to the modes and hooks of modules: all that is made later is made of this model."""
    before = [(one, one.training, {name: dict(vars(one)[name]) for name in _HOOKS}) for one in model.modules()]
    try:
        yield
    finally:
        for module, training, hooks in before:
            module.training = training
            for name, held in hooks.items():
                vars(module)[name].clear()
                vars(module)[name].update(held)
