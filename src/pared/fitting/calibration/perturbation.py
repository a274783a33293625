"""What errors cost where no gradient flows: each weight is disturbed by itself, and the outputs are compared.

For models that switch gradients off in their own forward, compute in numpy, or return tokens. One run of the recorded
calls for each weight; a gradient would tell every row of every weight in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.errors import CalibrationError
from pared.fitting.calibration.sensitivity import Sensitivity, TensorStats
from pared.formats.views import view_of
from pared.model.calls import Call
from pared.model.copies import shadow
from pared.model.outputs import Leaf, leaves_of
from pared.model.tensors import Slot, find_tensors

# The disturbance, as a share of the root mean square of the weight: about what six bits would do.
_NOISE: Final = 2.0**-5
# Tokens change all at once or not at all, so the disturbance is doubled until some do, at most so often.
_DOUBLINGS: Final = 4
_MOST_CALLS: Final = 16


def perturb(model: nn.Module, calls: Sequence[Call], seed: int) -> Sensitivity:
    """Disturb one weight after the other.

    Args:
        model: left as it is.
        calls: what calibration called it with; the first of them are used.
        seed: of the disturbances.

    Raises:
        CalibrationError: two calls with the same input gave different outputs: nothing can be compared.

    >>> layer = nn.Linear(8, 2)
    >>> found = perturb(layer, [Call((torch.randn(4, 8),), {})], 0)
    >>> found.tensors["weight"].rows.shape
    torch.Size([2])
    """
    copied = shadow(model)
    calls = calls[:_MOST_CALLS]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        expected: list[list[Leaf]] = [_values(copied(*call.args, **call.kwargs)) for call in calls]
        if _difference(copied, calls, expected) > 0:
            raise CalibrationError(
                "the model gives different outputs for the same input, so what an error costs cannot be told",
                where=type(model).__name__,
                remedy="Switch off what is random in it, also in eval mode; or leave calib_dataloader out.",
            )
        slots = [slot for slot in find_tensors(copied) if slot.weight_like and slot.tensor.numel()]
        return Sensitivity({slot.name: _disturb(slot, copied, calls, expected, generator) for slot in slots})


def _disturb(
    slot: Slot, model: nn.Module, calls: Sequence[Call], expected: list[list[Leaf]], generator: torch.Generator
) -> TensorStats:
    tensor = slot.tensor.detach()
    rows = view_of(slot.module, slot.attribute, tuple(tensor.shape)).n_rows
    original = tensor.clone()
    scale = float(original.float().square().mean().sqrt())
    damage = variance = 0.0
    for doubling in range(_DOUBLINGS):
        deviation = _NOISE * 2**doubling * scale
        noise = torch.randn(tensor.shape, generator=generator) * deviation
        tensor.copy_(original + noise.to(original.dtype))
        damage, variance = _difference(model, calls, expected), deviation**2
        tensor.copy_(original)
        if damage > 0 or scale == 0:
            break
    each = damage / variance / rows if variance > 0 else 0.0
    return TensorStats(torch.full((rows,), each, dtype=torch.float64))


def _values(output: Any) -> list[Leaf]:
    """The outputs that are compared: the floats, or else all tensors."""
    floats = [replace(leaf, value=leaf.value.detach().clone()) for leaf in leaves_of(output)]
    return floats or [Leaf(leaf.clone()) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _difference(model: nn.Module, calls: Sequence[Call], expected: list[list[Leaf]]) -> float:
    """The mean over the outputs of the share that is lost: of the energy of floats, of the number of others."""
    lost: dict[int, float] = {}
    total: dict[int, float] = {}
    for call, wanted in zip(calls, expected, strict=True):
        found = _values(model(*call.args, **call.kwargs))
        for i, (ours, theirs) in enumerate(zip(wanted, found, strict=False)):
            error, energy = _compared(ours, theirs.value)
            lost[i], total[i] = lost.get(i, 0.0) + error, total.get(i, 0.0) + energy
    shares = [lost[i] / total[i] for i in total if total[i] > 0]
    return sum(shares) / len(shares) if shares else 0.0


def _compared(ours: Leaf, theirs: Tensor) -> tuple[float, float]:
    """What is lost, and of how much; all of it where the shape has changed."""
    if not ours.value.is_floating_point():
        total = float(ours.value.numel())
        return float((ours.value != theirs).sum()) if ours.value.shape == theirs.shape else total, total
    total = ours.energy()
    return ours.error(theirs) if ours.value.shape == theirs.shape else total, total
