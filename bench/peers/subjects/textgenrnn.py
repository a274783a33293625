"""textgenrnn, two LSTMs: 20 news documents calibrate, 110 others judge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bench.peers.subjects.subject import Judgement, Subject, decibels, join_single, randomized, single
from bench.zoo import textgenrnn as zoo

_BATCHES = (64, 1)
_SEED = 0
_COMPARED = 500  # contexts


@functools.cache
def calls() -> list[Tensor]:
    return zoo.calibration(_SEED)


def _run(x: Tensor, model: nn.Module) -> Tensor:
    logits: Tensor = model(x)
    return logits


@functools.cache
def _contexts() -> Tensor:
    return zoo.contexts("test", _SEED)[:_COMPARED].contiguous()


@functools.cache
def shapes() -> Mapping[str, Callable[[nn.Module], Tensor]]:
    return {f"{n} x 40 characters": functools.partial(_run, _contexts()[:n].contiguous()) for n in _BATCHES}


@torch.no_grad()
def judge(model: nn.Module, reference: nn.Module) -> Judgement:
    bits = float(zoo.scores(model, "test", _SEED).mean())
    return Judgement(bits, decibels(model(_contexts()).float(), reference(_contexts())))


SUBJECT = Subject(
    title="textgenrnn",
    load=zoo.load,
    blank=lambda: randomized(zoo.load()),
    calls=calls,
    parts=single(calls, {0: "texts"}),
    joined=join_single,
    shapes=shapes,
    judge=judge,
    score="bits per character",
    higher_is_better=False,
    fidelity="SQNR, dB",
)
