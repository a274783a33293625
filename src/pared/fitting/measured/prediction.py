"""The damage that is predicted of a result: of its weights, of those that a rule decides too, and of int8 inputs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from pared.fitting.calibration.observe import Statistics
from pared.fitting.calibration.sensitivity import Sensitivity
from pared.fitting.search.activations import find_candidates
from pared.model.contents import Contents, Stored
from pared.model.tensors import ModelTensor, ModelTensors


def of_weights(
    tensors: ModelTensors[nn.Module], contents: Contents, sensitivity: Sensitivity
) -> Iterator[tuple[Stored, float]]:
    """The tensors that are not stored exactly, each with the damage that is predicted of it."""
    for model_tensor, stored in zip(tensors, contents.tensors, strict=True):
        if stored.decision.treatment != "exact" and model_tensor.tensor.is_floating_point():
            yield stored, _damage(model_tensor, stored, sensitivity)


def _damage(model_tensor: ModelTensor, stored: Stored, sensitivity: Sensitivity) -> float:
    if stored.decision.damage is not None:
        return stored.decision.damage
    stats = sensitivity.tensors.get(stored.name)  # a rule decided, or the tensor was not free
    if stats is None:
        return 0.0
    error = model_tensor.tensor.detach().float() - stored.coded.decode().float()
    return float((stats.rows * model_tensor.view.matrix(error.square()).double().mean(1)).sum())


def of_inputs(
    tensors: ModelTensors[nn.Module], contents: Contents, seen: Statistics, sensitivity: Sensitivity
) -> float:
    """The damage of rounding the inputs of the layers that may run in int8."""
    total = 0.0
    for candidate in find_candidates(tensors.model, contents.tensors, seen.inputs):
        activation, noise = contents.activations.get(candidate.name), candidate.noise(sensitivity.inputs)
        if activation is not None and noise is not None and activation.mode != "gather":
            total += noise.cost(activation)
    return total
