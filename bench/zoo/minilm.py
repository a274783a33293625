"""all-MiniLM-L6-v2 on news: 1 - cosine to FP32's embedding, per document.

Documents: the Lee background corpus, dealt into calibration, search and test. Printed beside: the 50 Lee documents
with people's similarities, and 200 paragraphs of Wikipedia, which nothing was calibrated on.
"""

from __future__ import annotations

import functools

import torch
from examples import minilm
from torch import Tensor, nn

from bench import data
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion

_CALIBRATED_ON = 100
_MAX_TOKENS = 128  # in calibration
_BATCH = 8
_PASSAGES = 200


def _documents(part: data.Part, seed: int) -> list[str]:
    rest = len(data.news()) - _CALIBRATED_ON
    calibrating, searching, testing = data.deal(data.news(), [_CALIBRATED_ON, rest // 2, rest // 2], seed)
    return {"calibration": calibrating, "search": searching, "test": testing}[part]


def calibration(seed: int) -> list[dict[str, Tensor]]:
    texts = _documents("calibration", seed)
    return [minilm.tokenize(batch, _MAX_TOKENS) for batch in data.batches(texts, _BATCH)]


@functools.cache
def _expected(part: data.Part, seed: int) -> Tensor:
    return minilm.embed(minilm.load(), _documents(part, seed))


@functools.cache
def _elsewhere() -> tuple[Tensor, Tensor]:
    """FP32's embeddings of the Lee documents and of the paragraphs of Wikipedia."""
    model = minilm.load()
    return minilm.embed(model, minilm.documents()), minilm.embed(model, data.passages(_PASSAGES))


def scores(model: nn.Module, part: data.Part, seed: int) -> Scores:
    """1 - cosine, per document; below 0 only by rounding."""
    got, expected = minilm.embed(model, _documents(part, seed)), _expected(part, seed)
    result: Scores = (1 - nn.functional.cosine_similarity(got.double(), expected.double())).numpy()
    return result


@torch.no_grad()
def metrics(model: nn.Module, seed: int) -> dict[str, float]:  # noqa: ARG001  # the texts are the same for all seeds
    lee, passages = _elsewhere()
    documents = minilm.embed(model, minilm.documents())
    return {
        "1 - cos on Lee": minilm.distance(documents, lee),
        "Spearman with people": minilm.spearman(documents),
        "1 - cos on Wikipedia": minilm.distance(minilm.embed(model, data.passages(_PASSAGES)), passages),
    }


PAIR = Pair(
    name="all-MiniLM-L6-v2",
    load=minilm.load,
    calibration=calibration,
    scores=scores,
    criterion=AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=0.005),
    widened=False,
    metrics=metrics,
    note="1 - cosine to FP32, per news document",
)
