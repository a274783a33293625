"""Tuning norms and biases, with the codes fixed, so that the outputs on the calibration calls come near FP32's.

Adam (Kingma and Ba 2015) on what has one dimension; a part of the calls is kept apart and says
when to stop, and whether anything was won at all. It spends no byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bench.ablation.series import Series
from bench.ablation.staged import is_flat, with_flat
from bench.calibrated import Calibrated
from pared.model.calls import Call
from pared.model.contents import Contents
from pared.model.copies import shadow
from pared.model.outputs import Leaf, leaves_of
from pared.model.tensors import find_tensors

_STEPS, _EVERY = 36, 12  # of descent, each on one call; and how often the calls that were kept apart are looked at
_APART = 5  # every so many-th call is kept apart
_RATE = 1e-3  # relative to the size of each tensor


def tuned(known: Calibrated, base: Series) -> Iterator[Contents]:
    """The base's files, tuned."""
    for contents in base.contents:
        copied = shadow(known.model)
        with torch.no_grad():
            targets = [_leaves(copied, call) for call in known.seen.calls]
            model_tensors = {model_tensor.name: model_tensor.tensor for model_tensor in find_tensors(copied)}
            for stored in contents.tensors:
                model_tensors[stored.name].copy_(stored.coded.decode())
        free = {stored.name: model_tensors[stored.name] for stored in contents.tensors if is_flat(stored)}
        yield with_flat(contents, _descend(copied, free, known.seen.calls, targets))


def _descend(
    model: nn.Module, free: dict[str, Tensor], calls: Sequence[Call], targets: Sequence[Sequence[Leaf]]
) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    groups = []
    for tensor in free.values():
        tensor.requires_grad_(True)
        groups.append({"params": [tensor], "lr": _RATE * (float(tensor.detach().square().mean().sqrt()) or 1e-3)})
    apart = [i for i in range(len(calls)) if i % _APART == _APART - 1]
    seen = [i for i in range(len(calls)) if i % _APART != _APART - 1]

    def kept_apart() -> float:
        with torch.no_grad():
            return sum(float(_error(_leaves(model, calls[i]), targets[i])) for i in apart)

    best, found = kept_apart(), {}
    descent = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(descent, lambda step: 0.5 * (1 + math.cos(math.pi * step / _STEPS)))
    for step in range(1, _STEPS + 1):
        i = seen[(step - 1) % len(seen)]
        descent.zero_grad()
        _error(_leaves(model, calls[i]), targets[i]).backward()
        descent.step()
        schedule.step()
        if step % _EVERY == 0 and (now := kept_apart()) < best:
            best, found = now, {name: tensor.detach().clone() for name, tensor in free.items()}
    return found


def _error(leaves: Sequence[Leaf], targets: Sequence[Leaf]) -> Tensor:
    """The share of the targets' energy that is lost, the mean over outputs."""
    shares = [(a.value - b.value).square().sum() / b.energy() for a, b in zip(leaves, targets, strict=True)]
    return torch.stack(shares).mean()


def _leaves(model: nn.Module, call: Call) -> list[Leaf]:
    return leaves_of(model(*call.args, **call.kwargs))
