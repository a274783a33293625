"""Small language models whose logits can be computed by hand, and folders of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.targets.families.models import built
from tests.targets.gguf.folders import TEXTS, folder_with

TEXT = " ".join(TEXTS) * 3


class Recurrent(nn.Module):
    """Reads from left to right, so that the context counts."""

    def __init__(self, vocabulary: int = 17, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(vocabulary, 8)
        self.cell = nn.GRU(8, 8, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.cell(self.table(tokens))[0]
        logits: Tensor = self.head(4 * self.drop(hidden))
        return logits


def folder_of(path: Path, family: str = "Llama", kind: str = "smollm", **changes: Any) -> Path:
    """A Hugging Face folder of a small random model, with a tokenizer."""
    model: Any = built(family, **changes)
    model.save_pretrained(path)
    folder_with(path, kind, model.config.to_dict())
    return path
