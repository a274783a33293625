"""Tuning what stays in float: norms and biases make up for a part of what rounding the weights did.

The codes and steps are fixed; the one-dimensional parameters are moved by gradient descent (Adam, Kingma and Ba 2015)
so that the outputs on the calibration calls come near those of the float model. A part of the calls is kept apart
and says when to stop, and whether anything was won at all. No labels are used, and no byte is spent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from pared.outputs import Leaf, leaves_of
from pared.products import Product, Watch
from pared.stats import Call, shadow
from pared.tensors import Slot, find_tensors

# Below this damage there is little to make up for, and the float tensors' own rounding is in the way.
LEAST_DAMAGE: Final = 1e-3
# Steps of descent, each on one call, and how often the calls that were kept apart are looked at.
_STEPS: Final = 36
_EVERY: Final = 12
_APART: Final = 5  # every so many-th call is kept apart
_LEAST_CALLS: Final = 5
_RATE: Final = 1e-3  # relative to the size of each tensor
# The work that is worth it: so many multiplications, about a minute on two cores.
_MOST_WORK: Final = 3e12


def tune(
    model: nn.Module, decoded: Mapping[str, Tensor], free: Sequence[str], calls: Sequence[Call]
) -> dict[str, Tensor]:
    """Move one-dimensional parameters.

    Args:
        model: the float model; it is left as it is.
        decoded: every tensor as the artifact gives it back, by first name.
        free: the names of those that may move.
        calls: of calibration.

    Returns:
        the new values of the free tensors; empty where nothing was won, or where it would take too long.
    """
    copied = shadow(model)
    if len(calls) < _LEAST_CALLS or not free or _work(copied, calls) > _MOST_WORK:
        return {}
    with torch.no_grad():
        targets = [[Leaf(leaf.value.clone(), leaf.is_logits) for leaf in _leaves(copied, call)] for call in calls]
    if not targets[0]:
        return {}
    slots = {slot.name: slot for slot in find_tensors(copied)}
    with torch.no_grad():
        for name, value in decoded.items():
            slots[name].tensor.copy_(value)
    return _descend(copied, [slots[name] for name in free], calls, targets)


def _descend(
    model: nn.Module, free: Sequence[Slot], calls: Sequence[Call], targets: Sequence[Sequence[Leaf]]
) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    groups = []
    for slot in free:
        slot.tensor.requires_grad_(True)
        size = float(slot.tensor.detach().square().mean().sqrt())
        groups.append({"params": [slot.tensor], "lr": _RATE * (size or 1e-3)})
    apart = [i for i in range(len(calls)) if i % _APART == _APART - 1]
    seen = [i for i in range(len(calls)) if i % _APART != _APART - 1]
    best = _mean_error(model, calls, targets, apart)
    found: dict[str, Tensor] = {}
    descent = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(descent, lambda step: 0.5 * (1 + math.cos(math.pi * step / _STEPS)))
    for step in range(_STEPS):
        i = seen[step % len(seen)]
        with torch.enable_grad():
            descent.zero_grad()
            error(_leaves(model, calls[i]), targets[i]).backward()  # type: ignore[no-untyped-call]  # torch's
        descent.step()
        schedule.step()
        if (step + 1) % _EVERY == 0:
            now = _mean_error(model, calls, targets, apart)
            if now < best:
                best, found = now, {slot.name: slot.tensor.detach().clone() for slot in free}
    return found


def error(leaves: Sequence[Leaf], targets: Sequence[Leaf]) -> Tensor:
    """The share of the targets' energy that is lost, the mean over outputs; can be differentiated."""
    shares = []
    for leaf, target in zip(leaves, targets, strict=True):
        if target.is_logits:
            expected = target.value.log_softmax(-1)
            lost = 2 * (expected.exp() * (expected - leaf.value.log_softmax(-1))).sum()
        else:
            lost = (leaf.value - target.value).square().sum()
        shares.append(lost / (target.energy() or 1.0))
    return torch.stack(shares).mean()


def _mean_error(
    model: nn.Module, calls: Sequence[Call], targets: Sequence[Sequence[Leaf]], chosen: Sequence[int]
) -> float:
    with torch.no_grad():
        return sum(float(error(_leaves(model, calls[i]), targets[i])) for i in chosen) / len(chosen)


def _leaves(model: nn.Module, call: Call) -> list[Leaf]:
    return leaves_of(model(*call.args, **call.kwargs))


def _work(model: nn.Module, calls: Sequence[Call]) -> float:
    """Multiplications in all steps, forward and back: what the time goes by, told without a clock."""
    columns = {slot.name: slot.tensor.numel() // max(1, slot.tensor.shape[0]) for slot in _weights(model)}
    total = 0.0

    def tell(product: Product) -> None:
        nonlocal total
        if product.kind != "embedding":
            total += float(product.y.numel()) * columns[product.tensor]

    with torch.no_grad(), Watch({id(one): s.name for s in _weights(model) for one in s.objects}, tell):
        model(*calls[0].args, **calls[0].kwargs)
    return 3 * _STEPS * total


def _weights(model: nn.Module) -> list[Slot]:
    return [slot for slot in find_tensors(model) if slot.weight_like]
