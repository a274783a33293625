"""Models that turn texts into vectors: 100 news documents calibrate, the 50 Lee documents judge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from bench.peers.subjects.subject import Judgement, Part, Run, Subject, randomized

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


def _run(inputs: dict[str, Tensor], model: nn.Module) -> Tensor:
    hidden: Tensor = model(**inputs).last_hidden_state
    return hidden


def embedder(title: str, source: Any, sizes: Sequence[tuple[int, int]]) -> Subject:
    """The subject of a model and its texts.

    Args:
        source: `examples.minilm`, or a module with the same functions.
        sizes: the texts and tokens of the timed calls.
    """

    def parts(model: nn.Module) -> Mapping[str, Part]:
        names = ("input_ids", "attention_mask")
        calls, singles = (
            [tuple(call[name] for name in names) for call in source.calibration(batch_size=size)] for size in (8, 1)
        )
        axes = {0: "batch", 1: "tokens"}
        return {"model": Part(_Plain(model), names, ("hidden",), calls, dict.fromkeys(names, axes), singles)}

    @functools.cache
    def shapes() -> Mapping[str, Callable[[nn.Module], Tensor]]:
        texts = sorted(source.unseen(_CANDIDATES), key=len)[-max(count for count, _ in sizes) :]
        found = {}
        for count, tokens in sizes:
            inputs = {name: value[:count].contiguous() for name, value in source.tokenize(texts, tokens).items()}
            assert bool(inputs["attention_mask"].all())
            found[f"{count} x {tokens} tokens"] = functools.partial(_run, inputs)
        return found

    return Subject(
        title=title,
        load=source.load,
        blank=lambda: randomized(source.load()),
        calls=source.calibration,
        parts=parts,
        joined=lambda runs: _Joined(runs["model"]),
        shapes=shapes,
        watch=lambda model: source.embed(model, source.documents()),
        judge=lambda got, expected: Judgement(source.spearman(got), source.distance(got, expected)),
        score="Spearman with people",
        higher_is_better=True,
        fidelity="1 - cos",
        transformer=True,
    )
