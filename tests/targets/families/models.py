"""Small random models of every family, as transformers builds them."""

from __future__ import annotations

from typing import Any, Final

import torch
import transformers
from torch import nn

_WIDTH: Final = 64
_SMALL: Final = {
    "hidden_size": _WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: Final = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 256}
_HEADS: Final = {**_GROUPED, "head_dim": 32}

CONFIGS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "Llama": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "Mistral": ("MistralConfig", _GROUPED),
    "Qwen2": ("Qwen2Config", {**_GROUPED, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 128}),
    "Gemma": ("GemmaConfig", {**_HEADS, "pad_token_id": 0}),
    "Gemma 2": ("Gemma2Config", {**_HEADS, "pad_token_id": 0, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "Gemma 3": ("Gemma3TextConfig", {**_HEADS, "pad_token_id": 0, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "Phi-3": ("Phi3Config", {**_GROUPED, "pad_token_id": 0}),
    "GPT-2": (
        "GPT2Config",
        {"n_embd": _WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 1024, "vocab_size": 320}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "BERT": ("BertConfig", {**_SMALL, "max_position_embeddings": 128}),
}


def built(family: str, **changes: Any) -> nn.Module:
    """A model of a family. Its numbers, also those of norms and biases, are random and far from the usual start."""
    name, options = CONFIGS[family]
    config = getattr(transformers, name)(**{**options, **changes})
    auto: Any = transformers.AutoModel if family == "BERT" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.config.architectures = [type(model).__name__]
    return model
