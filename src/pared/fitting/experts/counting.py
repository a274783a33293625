"""How many tokens reach each expert in calibration, from one more run of the recorded calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.fitting.experts.finding import Mixture
from pared.model.calls import Call
from pared.model.copies import shadow
from pared.model.outputs import tensors_of
from pared.model.tensors import ModelTensors

_INDICES: Final = (torch.int64, torch.int32)


def routed(tensors: ModelTensors[nn.Module], found: Sequence[Mixture], calls: Sequence[Call]) -> dict[str, Tensor]:
    """The tokens that each expert gets, by the name of the module that holds them.

    An expert that is a module counts the rows of its inputs. A module of stacked experts is called with the experts of
    each token, whole numbers below their number (the number itself means none), or with how many tokens each one gets.

    Args:
        tensors: those of the model, which is left as it is.
        found: its mixtures.
        calls: the calls of calibration, which are repeated.

    Returns:
        float64 (experts,) each; nothing for stacks whose arguments say neither.
    """
    if not found:
        return {}
    copied = shadow(tensors.model)
    with counting(copied, found) as counts, torch.no_grad():
        for call in calls:
            call.on(copied)
    return counts


@contextmanager
def counting(model: nn.Module, found: Sequence[Mixture]) -> Iterator[dict[str, Tensor]]:
    """While the context is entered, add up the tokens that each expert of a model gets, see `routed`."""
    counts: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for mixture in found:
            holder = model.get_submodule(mixture.name)
            if len(mixture.tensors[0]) == 1:
                hook = partial(_by_arguments, counts, mixture)
                hooks.callback(holder.register_forward_pre_hook(hook, with_kwargs=True).remove)
                continue
            counts[mixture.name] = torch.zeros(mixture.count, dtype=torch.float64)
            for place, member in enumerate(holder.children()):
                hook = partial(_by_rows, counts[mixture.name], place)
                hooks.callback(member.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield counts


def _by_rows(counts: Tensor, place: int, _: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    inputs = tensors_of((args, dict(kwargs)))
    if inputs:
        counts[place] += inputs[0].numel() // inputs[0].shape[-1] if inputs[0].dim() else 1


def _by_arguments(
    counts: dict[str, Tensor], mixture: Mixture, _: nn.Module, args: Any, kwargs: Mapping[str, Any]
) -> None:
    each = _of_each((*args, *kwargs.values()), mixture.count)
    if each is not None:
        counts[mixture.name] = counts.get(mixture.name, torch.zeros(mixture.count, dtype=torch.float64)) + each.cpu()


def _of_each(values: Sequence[Any], count: int) -> Tensor | None:
    """The tokens of each expert, from the arguments of a call; None if they do not say."""
    for value in values:
        if isinstance(value, (list, tuple)) and len(value) == count and all(type(one) is int for one in value):
            return torch.tensor(value, dtype=torch.float64)
    for leaf in tree_leaves(list(values)):
        if isinstance(leaf, Tensor) and leaf.dtype in _INDICES and leaf.numel():
            chosen = leaf.reshape(-1)
            if int(chosen.min()) >= 0 and int(chosen.max()) <= count:
                return torch.bincount(chosen, minlength=count)[:count].double()
    return None
