"""Small models that generate text, quantized, and graphs that answer them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from bench.calls import kinds_noted
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

import pared
from pared import PostTrainingQuantConfig
from pared.runtime import float_forms
from pared.runtime.graphs.capturing.capture import Captures
from pared.runtime.serving.graph_server import GraphServer
from pared.runtime.serving.openvino_server import OpenVinoServer
from pared.runtime.serving.served import SERVER, on_modules, serve
from tests.runtime.test_graphs import forced

STEPS = 22
PROMPT = torch.tensor([[5, 71, 33, 8, 90, 14]])
OTHER = torch.tensor([[60, 7, 7, 41]])
SOUND = torch.linspace(-1, 1, 8 * 40).sin().reshape(1, 8, 40)


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=100, num_hidden_layers=2, pad_token_id=0, initializer_range=0.2, **sizes)
    )


def gpt2() -> nn.Module:
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2, **tokens)
    )


def whisper() -> nn.Module:
    sides = {
        f"{side}_{what}": number
        for side in ("encoder", "decoder")
        for what, number in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))
    }
    lengths = {"max_source_positions": 20, "max_target_positions": 60, "num_mel_bins": 8, "d_model": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    no_tokens = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=100, init_std=0.2, **sides, **lengths, **tokens, **no_tokens)
    )


MODELS = {"llama": llama, "gpt2": gpt2, "whisper": whisper}
SERVERS: dict[str, type[GraphServer]] = {"graph": GraphServer, "openvino": OpenVinoServer}


@cache
def quantized(name: str) -> nn.Module:
    """A quantized model whose modules answer all calls."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    whole = {"input_features": SOUND, "decoder_input_ids": PROMPT} if name == "whisper" else {"input_ids": PROMPT}
    q = forced(model, pared.fit(model, PostTrainingQuantConfig(quant_level=0), [whole], quiet=True), "int8")
    serve(q, GraphServer(float_forms.outline_of))
    return on_modules(q)


@cache
def captures(_name: str) -> Captures:
    """Those of a model, for all tests."""
    return Captures()


def steps(model: nn.Module, prompt: Tensor, count: int = STEPS, caches: Any = None, **more: Any) -> tuple[Tensor, Any]:
    """The logits of greedy decoding, and the cache."""
    given: dict[str, Any] = {"use_cache": True, **more}
    if isinstance(model, WhisperForConditionalGeneration):
        heard = model.get_encoder()(SOUND.expand(len(prompt), -1, -1)).last_hidden_state
        given["encoder_outputs"] = BaseModelOutput(heard)
    name = "decoder_input_ids" if "encoder_outputs" in given else "input_ids"
    found, read = [], prompt
    with torch.no_grad():
        for _ in range(count):
            out = model(**{name: read}, past_key_values=caches, **given)
            assert caches is None or out.past_key_values is caches
            caches = out.past_key_values
            found.append(out.logits[:, -1])
            read = out.logits[:, -1:].argmax(-1)
            if "attention_mask" in given:
                given["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(read)], 1)
    return torch.stack(found, 1), caches


@contextmanager
def served(q: nn.Module, form: str, use: Callable[[nn.Module], Any]) -> Iterator[GraphServer]:
    """The model with a graph for each kind of call that the use makes."""
    with kinds_noted(q) as seen:
        use(q)
    server = SERVERS[form](float_forms.outline_of, list(seen.values()), captures(type(q).__name__))
    q.__dict__[SERVER] = server
    try:
        yield server
    finally:
        on_modules(q)


def near(found: Tensor, expected: Tensor, most: float = 1e-2) -> bool:
    return bool((found - expected).square().sum() <= most * expected.square().sum())
