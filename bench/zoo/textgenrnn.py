"""textgenrnn, a character language model, on news: bits per character, per document.

Weights: source archive textgenrnn 2.0.0 (MIT), a Keras file of float32. Documents: the Lee background corpus, dealt
into calibration, search and test; printed beside: the 50 Lee documents and Wikipedia.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence

import h5py
import numpy as np
import torch
from examples import minilm
from torch import Tensor, nn

from bench import data
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion

_SYMBOLS, _EMBEDDED, _HIDDEN = 465, 100, 128
_CONTEXT = 40  # characters that predict the next one
_PREDICTED = 100  # characters per document
_BATCH = 500
_DOCUMENTS = {"calibration": 20, "search": 110, "test": 110}
_CALIBRATION_BATCHES = 40
_PASSAGES = 50


class TextGen(nn.Module):
    """Embedding, two LSTMs, an average over the context weighted by attention, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        joined = _EMBEDDED + 2 * _HIDDEN
        self.embedding = nn.Embedding(_SYMBOLS, _EMBEDDED)
        self.rnn_1 = nn.LSTM(_EMBEDDED, _HIDDEN, batch_first=True)
        self.rnn_2 = nn.LSTM(_HIDDEN, _HIDDEN, batch_first=True)
        self.attention = nn.Parameter(torch.zeros(joined, 1))
        self.output = nn.Linear(joined, _SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        """Logits of the next symbol, float32 (texts, 465), from int64 (texts, context)."""
        embedded = self.embedding(symbols)
        first, _ = self.rnn_1(embedded)
        second, _ = self.rnn_2(first)
        joined = torch.cat([embedded, first, second], -1)
        weights = (joined @ self.attention).softmax(1)
        logits: Tensor = self.output((joined * weights).sum(1))
        return logits


def load() -> nn.Module:
    """The pretrained model."""
    with h5py.File(data.FOLDER / "textgenrnn" / "textgenrnn" / "textgenrnn_weights.hdf5") as file:

        def array(layer: str, name: str) -> Tensor:
            return torch.from_numpy(np.array(file[f"{layer}/{layer}/{name}:0"]))

        state = {
            "embedding.weight": array("embedding", "embeddings"),
            "attention": array("attention", "attention_W"),
            "output.weight": array("output", "kernel").T,
            "output.bias": array("output", "bias"),
        }
        for layer in ("rnn_1", "rnn_2"):
            input_bias, hidden_bias = array(layer, "bias").chunk(2)
            state[f"{layer}.weight_ih_l0"] = _gates(array(layer, "kernel"))
            state[f"{layer}.weight_hh_l0"] = _gates(array(layer, "recurrent_kernel"))
            state[f"{layer}.bias_ih_l0"], state[f"{layer}.bias_hh_l0"] = input_bias, hidden_bias
    model = TextGen()
    model.load_state_dict(state)
    return model.eval()


def _gates(kernel: Tensor) -> Tensor:
    """Torch's layout, (4 * hidden, inputs): each gate's matrix is stored in it, under the other's shape."""
    return torch.cat([gate.reshape(_HIDDEN, -1) for gate in kernel.chunk(4, 1)])


@functools.cache
def _vocabulary() -> dict[str, int]:
    file = data.FOLDER / "textgenrnn" / "textgenrnn" / "textgenrnn_vocab.json"
    symbols: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))
    return symbols


def _windows(text: str, most: int) -> Tensor:
    """Context and next symbol, int64 (windows, context + 1); characters that the model does not know are left out."""
    symbols = [_vocabulary()[c] for c in text if c in _vocabulary()][: most + _CONTEXT]
    return torch.tensor(symbols).unfold(0, _CONTEXT + 1, 1)


def contexts(part: data.Part, seed: int) -> Tensor:
    """What the model reads of the documents of a part, int64 (windows, context)."""
    return torch.cat([_windows(text, _PREDICTED) for text in documents(part, seed)])[:, :-1].contiguous()


def documents(part: data.Part, seed: int) -> list[str]:
    texts = [text for text in data.news() if len(text) > 2 * (_CONTEXT + _PREDICTED)]
    return dict(zip(_DOCUMENTS, data.deal(texts, list(_DOCUMENTS.values()), seed), strict=True))[part]


def calibration(seed: int) -> list[Tensor]:
    return list(contexts("calibration", seed).chunk(_CALIBRATION_BATCHES))


@torch.no_grad()
def read(model: nn.Module, texts: Sequence[str]) -> Tensor:
    """Logits of the first `_PREDICTED` characters of each text, of which there must be as many: (windows, 465)."""
    windows = torch.cat([_windows(text, _PREDICTED) for text in texts])
    return torch.cat([model(batch[:, :-1].contiguous()).float() for batch in windows.split(_BATCH)])


def bits(logits: Tensor, texts: Sequence[str]) -> Scores:
    """Bits per character of each text, by a model's logits."""
    windows = torch.cat([_windows(text, _PREDICTED) for text in texts])
    nats = nn.functional.cross_entropy(logits.double(), windows[:, -1], reduction="none")
    result: Scores = (nats.reshape(len(texts), _PREDICTED).mean(1) / math.log(2)).numpy()
    return result


def scores(model: nn.Module, part: data.Part, seed: int) -> Scores:
    texts = documents(part, seed)
    return bits(read(model, texts), texts)


def metrics(model: nn.Module, seed: int) -> dict[str, float]:  # noqa: ARG001  # the texts are the same for all seeds
    return {
        f"bits per character on {name}": float(bits(read(model, texts), texts).mean())
        for name, texts in (("Lee", minilm.documents()), ("Wikipedia", data.passages(_PASSAGES)))
    }


PAIR = Pair(
    name="textgenrnn",
    load=load,
    calibration=calibration,
    scores=scores,
    criterion=AccuracyCriterion(higher_is_better=False),
    metrics=metrics,
    note="bits per character, per news document",
)
