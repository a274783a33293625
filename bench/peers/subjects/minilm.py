"""all-MiniLM-L6-v2: 100 news documents calibrate, the 50 Lee documents judge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from examples import minilm
from torch import Tensor, nn

from bench.peers.subjects.subject import Judgement, Part, Run, Subject, randomized

_TOKENS = 128
_BATCHES = (8, 1)
_CANDIDATES = 100  # unseen documents, of which the longest are taken


class _Plain(nn.Module):
    """The model with tensors only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        model.pooler = None  # nobody uses it: a graph without it is the same

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


class _Joined(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.run(input_ids, attention_mask)[0])


def _parts(model: nn.Module) -> Mapping[str, Part]:
    names = ("input_ids", "attention_mask")
    calls, singles = (
        [tuple(call[name] for name in names) for call in minilm.calibration(batch_size=size)] for size in (8, 1)
    )
    axes = {0: "batch", 1: "tokens"}
    return {"model": Part(_Plain(model), names, ("hidden",), calls, dict.fromkeys(names, axes), singles)}


def _run(inputs: dict[str, Tensor], model: nn.Module) -> Tensor:
    hidden: Tensor = model(**inputs).last_hidden_state
    return hidden


@functools.cache
def shapes() -> Mapping[str, Callable[[nn.Module], Tensor]]:
    texts = sorted(minilm.unseen(_CANDIDATES), key=len)[-max(_BATCHES) :]
    inputs = minilm.tokenize(texts, _TOKENS)
    assert bool(inputs["attention_mask"].all())
    cut: dict[int, dict[str, Any]] = {n: {k: v[:n].contiguous() for k, v in inputs.items()} for n in _BATCHES}
    return {f"{n} x {_TOKENS} tokens": functools.partial(_run, cut[n]) for n in _BATCHES}


def watch(model: nn.Module) -> Tensor:
    return minilm.embed(model, minilm.documents())


def judge(got: Tensor, expected: Tensor) -> Judgement:
    return Judgement(minilm.spearman(got), minilm.distance(got, expected))


SUBJECT = Subject(
    title="MiniLM",
    load=minilm.load,
    blank=lambda: randomized(minilm.load()),
    calls=minilm.calibration,
    parts=_parts,
    joined=lambda runs: _Joined(runs["model"]),
    shapes=shapes,
    watch=watch,
    judge=judge,
    score="Spearman with people",
    higher_is_better=True,
    fidelity="1 - cos",
    transformer=True,
)
