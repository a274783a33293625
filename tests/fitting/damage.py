"""What errors cost a model: predicted by gradients, and measured."""

import torch
from torch import Tensor, nn

from pared.fitting.calibration import observe, sensitivity
from pared.fitting.calibration.sensitivity import Sensitivity
from pared.model.outputs import leaves_of
from pared.model.tensors import find_tensors


def measured(model: nn.Module, batches: list[Tensor], seed: int = 0) -> Sensitivity:
    seen = observe.collect(model, batches, 10**6)
    found = sensitivity.measure(find_tensors(model), seen.calls, seen.energies, seed)
    assert found is not None
    return found


def damage(model: nn.Module, noisy: nn.Module, batches: list[Tensor]) -> float:
    """The mean share of each output's energy that is lost."""
    with torch.no_grad():
        pairs = [list(zip(leaves_of(model(x)), leaves_of(noisy(x)), strict=True)) for x in batches]
    shares = []
    for leaf in range(len(pairs[0])):
        lost = sum(one[leaf][0].error(one[leaf][1].value) for one in pairs)
        shares.append(lost / sum(one[leaf][0].energy() for one in pairs))
    return sum(shares) / len(shares)
