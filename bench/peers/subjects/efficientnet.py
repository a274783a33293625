"""EfficientNet-Lite0: a quarter of one half of the photos calibrates, the other half judges."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from examples import effnet
from torch import Tensor, nn

from bench.peers.subjects.subject import Judgement, Subject, join_single, randomized, single
from bench.zoo import efficientnet as zoo

_BATCHES = (1, 8)
_SEED = 0


@functools.cache
def calls() -> list[Tensor]:
    return zoo.calibration(_SEED)


def _run(x: Tensor, model: nn.Module) -> Tensor:
    logits: Tensor = model(x)
    return logits


@functools.cache
def shapes() -> Mapping[str, Callable[[nn.Module], Tensor]]:
    photos = zoo.inputs("test", _SEED)
    return {f"batch {n}": functools.partial(_run, photos[:n].contiguous()) for n in _BATCHES}


def watch(model: nn.Module) -> Tensor:
    return zoo.log_probabilities(model, "test", _SEED)


def judge(got: Tensor, expected: Tensor) -> Judgement:
    divergence = nn.functional.kl_div(got, expected, reduction="none", log_target=True).sum(-1).mean()
    agreement = (got.argmax(-1) == expected.argmax(-1)).double().mean()
    return Judgement(float(agreement), float(divergence))


SUBJECT = Subject(
    title="EfficientNet-Lite0",
    load=effnet.load,
    blank=lambda: randomized(effnet.load()),
    calls=calls,
    parts=single(calls, {0: "batch"}),
    joined=join_single,
    shapes=shapes,
    watch=watch,
    judge=judge,
    score="top-1 agreement with FP32",
    higher_is_better=True,
    fidelity="KL, nat",
)
