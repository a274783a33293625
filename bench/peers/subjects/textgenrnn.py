"""textgenrnn, two LSTMs: 20 news documents calibrate, 110 others judge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from bench.peers.subjects.subject import Judgement, Subject, decibels, join_single, randomized, single
from bench.zoo import textgenrnn as zoo

_BATCHES = (64, 1)
_SEED = 0


@functools.cache
def calls() -> list[Tensor]:
    return zoo.calibration(_SEED)


def _run(x: Tensor, model: nn.Module) -> Tensor:
    logits: Tensor = model(x)
    return logits


@functools.cache
def shapes() -> Mapping[str, Callable[[nn.Module], Tensor]]:
    contexts = zoo.contexts("test", _SEED)
    return {f"{n} x 40 characters": functools.partial(_run, contexts[:n].contiguous()) for n in _BATCHES}


def watch(model: nn.Module) -> Tensor:
    return zoo.read(model, zoo.documents("test", _SEED))


def judge(got: Tensor, expected: Tensor) -> Judgement:
    bits = zoo.bits(got, zoo.documents("test", _SEED))
    return Judgement(float(bits.mean()), decibels(got, expected))


SUBJECT = Subject(
    title="textgenrnn",
    load=zoo.load,
    blank=lambda: randomized(zoo.load()),
    calls=calls,
    parts=single(calls, {0: "texts"}),
    joined=join_single,
    shapes=shapes,
    watch=watch,
    judge=judge,
    score="bits per character",
    higher_is_better=False,
    fidelity="SQNR, dB",
)
