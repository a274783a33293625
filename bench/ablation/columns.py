"""What column scales inside a layer could gain, from the moments alone: nothing is rounded.

Feedback leaves `sum_j d_j * step_j^2 / 12`. One step for all columns costs the arithmetic mean of the d_j, steps by
column at the same rate cost their geometric mean: half the logarithm of the ratio is the gain in bits per weight. The
d_j of a finite sample spread more than the true ones; so the scales are also taken from one half of the calls and
judged by the other. What the scales cost, and what columns of unlike codes cost the coder, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bench.calibrated import Calibrated
from pared.fitting.rounding.feedback import factor

ENOUGH = 0.1  # bits per weight


@dataclass(frozen=True)
class Gain:
    """Of one tensor, in bits per weight.

    Args:
        name: of the tensor.
        weights: how many.
        naive: judged by the calls that the scales come from.
        unseen: judged by other calls.
    """

    name: str
    weights: int
    naive: float
    unseen: float


def gains(known: Calibrated) -> list[Gain]:
    """Of every tensor that is rounded with feedback."""
    found = []
    for model_tensor in known.model_tensors:
        stats = known.sensitivity.tensors.get(model_tensor.name)
        if not model_tensor.weight_like or stats is None or stats.moments is None or stats.unseen is None:
            continue
        known_half = factor(stats.moments - stats.unseen)
        d = known_half.remaining
        moments = stats.unseen.double()
        order = known_half.order
        moments = moments.gather(1, order[:, :, None].expand_as(moments)).gather(
            2, order[:, None, :].expand_as(moments)
        )
        # A rounding error of column j becomes one of column j and, by what it adds to them, of all later ones.
        spill = known_half.spill.double()
        identity = torch.eye(spill.shape[1], dtype=spill.dtype).expand_as(spill)
        pushed = torch.linalg.solve_triangular(spill, identity, upper=True, unitriangular=True)
        true = (pushed @ moments * pushed).sum(2)
        whole = factor(stats.moments).remaining
        naive = 0.5 * (whole.mean(1).log2() - whole.log2().mean(1))
        scaled = d.log().mean(1).exp() * (true / d).mean(1)
        unseen = 0.5 * (true.mean(1).clamp(min=1e-300).log2() - scaled.clamp(min=1e-300).log2())
        some = true.mean(1) > 0
        value = float(unseen[some].mean()) if bool(some.any()) else 0.0
        found.append(Gain(model_tensor.name, model_tensor.tensor.numel(), float(naive.mean()), value))
    return found


def summary(found: list[Gain]) -> dict[str, float]:
    weights = np.array([gain.weights for gain in found], float)
    naive, unseen = (np.array([getattr(gain, which) for gain in found]) for which in ("naive", "unseen"))
    return {
        "tensors": len(found),
        "above, naive": int((naive > ENOUGH).sum()),
        "above, unseen": int((unseen > ENOUGH).sum()),
        "bits, naive": float((naive * weights).sum() / weights.sum()),
        "bits, unseen": float((unseen * weights).sum() / weights.sum()),
        "bytes": float((np.clip(unseen, 0, None) * weights).sum() / 8),
    }
