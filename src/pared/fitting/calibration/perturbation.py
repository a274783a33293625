"""What errors cost where no gradient flows: weights are disturbed one at a time, and the outputs are compared.

For models that switch gradients off in their own forward, compute in NumPy, or return tokens. This takes one run of the
recorded calls for each weight, where one gradient would give every row of every weight.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pared.errors import CalibrationError
from pared.fitting.calibration.sensitivity import Sensitivity, TensorStats
from pared.model.calls import Call
from pared.model.copies import shadow
from pared.model.outputs import Key, Leaf, leaves_of, share_of_each
from pared.model.recorded import draws
from pared.model.tensors import ModelTensor, ModelTensors
from pared.switches import ignoring

# The disturbance as a share of the root mean square of the weight: about the error at six bits.
_NOISE: Final = 2.0**-5
# Small disturbances change no token, so they are doubled until some change, at most this many times.
_DOUBLINGS: Final = 4
_MOST_CALLS: Final = 16
# Differences up to this share of the energy are those of sums whose order the threads decide.
_ROUNDING: Final = 1e-10


def perturb(
    tensors: ModelTensors[nn.Module], calls: Sequence[Call], seed: int, logits: Container[str] = ()
) -> Sensitivity:
    """Measure what errors in each weight cost by disturbing it, with the same cost for all of its rows.

    Args:
        tensors: those of the model, which is left as it is.
        calls: the calls of calibration; the first 16 are repeated.
        seed: seeds the random disturbances.
        logits: the paths of the outputs that count as logits, too.

    Raises:
        CalibrationError: the same input gave two different outputs, so nothing can be compared; or the calls cannot be
            made again.

    >>> layer = nn.Linear(8, 2)
    >>> from pared.model.tensors import find_tensors
    >>> found = perturb(find_tensors(layer), [Call((torch.randn(4, 8),), {})], 0)
    >>> found.tensors["weight"].rows.shape
    torch.Size([2])
    """
    copied = shadow(tensors.model)
    calls = calls[:_MOST_CALLS]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), ignoring():
        expected = _repeated(copied, calls, logits)
        if difference(copied, calls, expected) > _ROUNDING:
            raise _refusal(copied, calls, logits, type(tensors.model).__name__)
        weights = [tensor for tensor in tensors.in_copy(copied) if tensor.weight_like and tensor.tensor.numel()]
        return Sensitivity({w.name: _disturb(w, copied, calls, expected, generator) for w in weights})


def _repeated(model: nn.Module, calls: Sequence[Call], logits: Container[str]) -> list[list[Leaf]]:
    try:
        return [values_of(model, call, logits) for call in calls]
    except Exception as error:
        raise CalibrationError(
            f"the model raised {type(error).__name__} when a call of the calibration data was made again: {error}",
            where=type(model).__name__,
            remedy="Check that the same call can be made twice: a generator, for instance, can be read only once. Or "
            "leave calib_dataloader out.",
        ) from error


def _refusal(model: nn.Module, calls: Sequence[Call], logits: Container[str], where: str) -> CalibrationError:
    """Why the same calls give other outputs: random numbers, or something that the calls leave behind."""
    expected = []
    with draws.alike():
        expected += [values_of(model, call, logits) for call in calls]
    with draws.alike():
        is_random = difference(model, calls, expected) <= _ROUNDING
    if is_random:
        return CalibrationError(
            "the model gives different outputs for the same input, as it draws random numbers: the cost of errors "
            "cannot be measured",
            where=where,
            remedy="Switch off what is random in eval mode, or leave calib_dataloader out.",
        )
    return CalibrationError(
        "the model gives different outputs for the same input, and draws no random numbers: it keeps something between "
        "calls that cannot be put back, such as a global variable or a generator that is used up, so the cost of "
        "errors cannot be measured",
        where=where,
        remedy="Keep it in an attribute of a module or in a buffer, pass lists in place of generators, or leave "
        "calib_dataloader out.",
    )


def _disturb(
    weight: ModelTensor, model: nn.Module, calls: Sequence[Call], expected: list[list[Leaf]], generator: torch.Generator
) -> TensorStats:
    tensor, rows = weight.tensor.detach(), weight.view.n_rows
    original = tensor.clone()
    scale = float(original.float().square().mean().sqrt())
    damage = variance = 0.0
    for doubling in range(_DOUBLINGS):
        deviation = _NOISE * 2**doubling * scale
        noise = torch.randn(tensor.shape, generator=generator) * deviation
        tensor.copy_(original + noise.to(original.dtype))
        damage, variance = difference(model, calls, expected), deviation**2
        tensor.copy_(original)
        if damage > 0 or scale == 0:
            break
    each = damage / variance / rows if variance > 0 else 0.0
    return TensorStats(torch.full((rows,), each, dtype=torch.float64))


def values_of(model: nn.Module, call: Call, logits: Container[str] = ()) -> list[Leaf]:
    """The outputs of a call that are compared: the floating ones, or all tensors if there are none."""
    output = call.on(model)
    floats = [replace(leaf, value=leaf.value.detach().clone()) for leaf in leaves_of(output, logits, call.task)]
    others = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return floats or [Leaf(leaf.clone(), path=str(i)) for i, leaf in enumerate(others)]


def difference(model: nn.Module, calls: Sequence[Call], expected: list[list[Leaf]]) -> float:
    """The damage of the disturbed model: the mean over the outputs of the share that is lost."""
    found = losses(model, calls, expected)
    shares = [lost / total for lost, total in found.values() if total > 0]
    return sum(shares) * share_of_each(key for key, (_, total) in found.items() if total > 0)


def losses(model: nn.Module, calls: Sequence[Call], expected: list[list[Leaf]]) -> dict[Key, tuple[float, float]]:
    """The loss of each output over all calls, and the total it is a share of: energy of floats, or number of values.

    Args:
        model: the disturbed model.
        calls: what it is called with.
        expected: the outputs of the undisturbed model for each call, from `values_of`.
    """
    found: dict[Key, tuple[float, float]] = {}
    for call, wanted in zip(calls, expected, strict=True):
        got = {leaf.path: leaf.value for leaf in values_of(model, call)}
        for ours in wanted:
            if ours.path in got:
                error, energy = _compared(ours, got[ours.path])
                lost, total = found.get(ours.key, (0.0, 0.0))
                found[ours.key] = lost + error, total + energy
    return found


def _compared(ours: Leaf, theirs: Tensor) -> tuple[float, float]:
    """The loss and the total of which it is a part; everything is lost if the shape has changed."""
    if not ours.value.is_floating_point():
        total = float(ours.value.numel())
        return float((ours.value != theirs).sum()) if ours.value.shape == theirs.shape else total, total
    total = ours.energy()
    return ours.error(theirs) if ours.value.shape == theirs.shape else total, total
