"""g2p-en on 2 x 5000 words of CMUdict: 1 - phoneme error rate, per word."""

from __future__ import annotations

import functools

import numpy as np
import torch
from examples import g2p
from torch import Tensor, nn

from bench import data
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion

_WORDS = {"calibration": 500, "search": 5000, "test": 5000}
_BATCH = 1000
START, END = g2p.START, g2p.END


class Speaker(g2p.G2P):
    """The example's network, which gives logits in place of phonemes."""

    def forward(self, letters: Tensor, lengths: Tensor, steps: int = 20) -> Tensor:
        """Logits, float32 (words, steps, phonemes), of greedy decoding; 0 for all phonemes once a word has ended."""
        embedded = self.enc_emb(letters)
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        _, hidden = self.enc(packed)
        token = torch.full((len(letters), 1), START, device=letters.device)
        going = torch.ones(len(letters), 1, 1, device=letters.device)
        logits = []
        for _ in range(steps):
            output, hidden = self.dec(self.dec_emb(token), hidden)
            logits.append(self.fc(output) * going)
            token = logits[-1].argmax(-1)
            going = going * (token != END)[..., None]
        return torch.cat(logits, 1)


def load() -> nn.Module:
    """The pretrained model."""
    model = Speaker()
    model.load_state_dict(g2p.load().state_dict())
    return model.eval()


@functools.cache
def _words(part: data.Part, seed: int) -> list[str]:
    return dict(zip(_WORDS, data.deal(list(g2p.dictionary()), list(_WORDS.values()), seed), strict=True))[part]


def calibration(seed: int) -> list[dict[str, Tensor]]:
    batches = data.batches(_words("calibration", seed), 50)
    return [dict(zip(("letters", "lengths"), g2p.encode(batch), strict=True)) for batch in batches]


@torch.no_grad()
def _errors(model: nn.Module, words: list[str]) -> Scores:
    """Edits to the nearest known pronunciation, and its length, float64 (2, words)."""
    said = [row for batch in data.batches(words, _BATCH) for row in model(*g2p.encode(batch)).argmax(-1).tolist()]
    known = [g2p.dictionary()[word] for word in words]
    return np.array([g2p.errors(*pair) for pair in zip(said, known, strict=True)], dtype=np.float64).T


def scores(model: nn.Module, part: data.Part, seed: int) -> Scores:
    """1 - edits over the mean length, so that the mean is 1 - phoneme error rate."""
    errors, lengths = _errors(model, _words(part, seed))
    result: Scores = 1 - errors / lengths.mean()
    return result


def metrics(model: nn.Module, seed: int) -> dict[str, float]:
    errors, lengths = _errors(model, _words("test", seed))
    return {"phoneme error rate": float(errors.sum() / lengths.sum()), "words wrong": float((errors > 0).mean())}


PAIR = Pair(
    name="g2p-en",
    load=load,
    calibration=calibration,
    scores=scores,
    criterion=AccuracyCriterion(),
    metrics=metrics,
    note="1 - phoneme error rate, per word",
)
