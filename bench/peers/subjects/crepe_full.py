"""CREPE full: 60 frames of 15 tones calibrate, 240 frames of 60 others judge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from bench.peers.subjects.subject import Judgement, Subject, decibels, join_single, randomized, single
from bench.zoo import crepe
from bench.zoo.crepe_full import FULL

_BATCHES = (16, 1)
_SEED = 0


@functools.cache
def calls() -> list[Tensor]:
    return crepe.calibration(FULL, _SEED)


def _run(x: Tensor, model: nn.Module) -> Tensor:
    pitches: Tensor = model(x)
    return pitches


@functools.cache
def _frames() -> Tensor:
    return crepe.frames(FULL, "test", _SEED)


@functools.cache
def shapes() -> Mapping[str, Callable[[nn.Module], Tensor]]:
    return {f"{n} frame{'s' * (n > 1)}": functools.partial(_run, _frames()[:n].contiguous()) for n in _BATCHES}


def watch(model: nn.Module) -> Tensor:
    return crepe.hear(FULL, model, "test", _SEED)


def judge(got: Tensor, expected: Tensor) -> Judgement:
    return Judgement(float(crepe.accuracies(FULL, got, "test", _SEED).mean()), decibels(got, expected))


SUBJECT = Subject(
    title="CREPE full",
    load=lambda: crepe.load(FULL),
    blank=lambda: randomized(crepe.load(FULL)),
    calls=calls,
    parts=single(calls, {0: "frames"}),
    joined=join_single,
    shapes=shapes,
    watch=watch,
    judge=judge,
    score="raw pitch accuracy",
    higher_is_better=True,
    fidelity="SQNR, dB",
)
