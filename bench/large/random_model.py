"""Folders of language models with random weights, written shard by shard in bfloat16."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from pared.fitting.hugging_face.loading import skeleton_in
from pared.model.tensors import find_tensors

# The sizes of published models.
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "qwen-1.5b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
    "llama-7b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    },
}
_SHARD: Final = 1 << 29  # bytes


def write(folder: Path, shape: dict[str, Any]) -> None:
    """Write a model whose activations stay of the order of 1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**shape, "dtype": "bfloat16"}))
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    placed: dict[str, str] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        placed.update(dict.fromkeys(shard, name))
        shard.clear()
        number += 1

    for tensor in find_tensors(skeleton_in(folder)):
        if tensor.persistent:
            size = tuple(tensor.tensor.shape)
            scale = 1 / math.sqrt(size[-1]) if len(size) > 1 else 0.0
            numbers = torch.empty(size, dtype=torch.bfloat16).normal_(generator=generator).mul_(scale)
            shard[tensor.name] = numbers if len(size) > 1 else torch.ones(size, dtype=torch.bfloat16)
            if sum(one.nbytes for one in shard.values()) > _SHARD:
                flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
