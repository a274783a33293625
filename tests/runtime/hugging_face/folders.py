"""A small language model, fitted and written as a folder that `from_pretrained` opens, once for all tests."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

import pared
from pared.fitting.hugging_face.loading import model_in
from tests.targets.families.models import built
from tests.targets.gguf.folders import folder_with

IDS = torch.arange(1, 13).reshape(1, 12)
EIGHT_BITS = pared.PostTrainingQuantConfig(quant_level=0)
WEIGHTS = pared.PostTrainingQuantConfig(quant_level=0, approach="weight_only")
_PLACE = tempfile.TemporaryDirectory()


@cache
def source() -> Path:
    """A Hugging Face folder: a Llama whose head is tied to its table, and a tokenizer with a chat template."""
    folder = Path(_PLACE.name) / "source"
    folder_with(folder, "smollm")
    built("Llama").save_pretrained(folder)
    return folder


@cache
def fitted() -> Any:
    """Its quantized model, in which every layer runs in int8 that may."""
    return pared.fit(model_in(source()), EIGHT_BITS, [{"input_ids": IDS}], quiet=True)


@cache
def folder() -> Path:
    """What its `save_pretrained` writes; nobody may change it."""
    place = Path(_PLACE.name) / "small"
    fitted().save_pretrained(place)
    return place


def text_of(model: Any) -> list[int]:
    """The tokens that follow, decoded greedily."""
    with torch.no_grad():
        found = model.generate(
            IDS, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(IDS), pad_token_id=0
        )
    tokens: list[int] = found[0].tolist()
    return tokens
