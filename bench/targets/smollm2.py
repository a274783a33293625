"""SmolLM2-135M as shipped: calibrated on news, judged by its perplexity on Wikipedia."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from examples import package_folder
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bench.targets import formats
from bench.targets.row import Row
from bench.zoo import smollm2 as zoo
from pared.fitting.preparation import Prepared
from pared.formats.groups.grid import GroupGrid
from pared.targets.target import Offer

_TOKENS, _CALIBRATED, _WINDOWS = 512, 16, 8
_HEAD = "lm_head.weight"
_TABLE = "model.embed_tokens.weight"
_BARS = {"Q4_0": 23.6, "W4A16 g128": 24.6, "mixed": 22.8}

# 576 columns are four groups and a half: vLLM would not take that, but the figures of others are of this.
_GRID = GroupGrid(4, 128)
_W4A16 = Offer("W4A16 g128", _GRID, lambda rows, columns: -(-_GRID.nbits(rows, columns) // 8))


def calibration() -> list[dict[str, object]]:
    """8192 tokens of news."""
    news = (package_folder("gensim") / "test" / "test_data" / "lee_background.cor").read_text(encoding="utf-8")
    ids = torch.tensor(zoo.encode(news)[: _TOKENS * _CALIBRATED]).reshape(-1, _TOKENS)
    return [{"input_ids": window, "use_cache": False} for window in ids.split(1)]


def perplexity(weights: formats.Weights) -> float:
    """In bfloat16, as the model is run; rotary positions stay in float32."""
    model = zoo.load(None)
    model.load_state_dict({**weights, _HEAD: weights[_TABLE]}, strict=False)
    model.bfloat16()
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)  # type: ignore[union-attr, arg-type]  # a Llama
    return zoo.perplexity(model, _TOKENS, _WINDOWS)


def rows() -> Iterator[Row]:
    model = zoo.load(None)
    exact = perplexity(model.state_dict())
    known = formats.prepared(model, calibration(), "gguf", _CALIBRATED)
    linear, targets = formats.linear(known), formats.targets_of(known)
    weights = sum(one.tensor.numel() for one in linear)
    names = {one.name for one in linear}

    def alone(offer: Offer, bar: float) -> Row:
        """Every linear layer in one format; the table, which is the head as well, as it is."""
        nbytes = formats.bytes_of(linear, offer)
        near = formats.rounded(model, lambda name, _: offer if name in names else None)
        start = time.process_time()
        ours = formats.solved(known, targets, offer)
        seconds = time.process_time() - start
        bits = 8 * nbytes / weights
        return Row(
            *("SmolLM2", offer.name, bits, nbytes, "perplexity", exact, perplexity(near), perplexity(ours), bar),
            seconds,
        )

    yield alone(formats.offer_of("gguf", "Q4_0"), _BARS["Q4_0"])
    yield alone(_W4A16, _BARS[_W4A16.name])
    yield _mixed(model, known, exact)


def _mixed(model: nn.Module, known: Prepared[nn.Module], exact: float) -> Row:
    """The bytes of llama.cpp's plain Q4_0, whose table, which is the head as well, is Q8_0."""
    coarse, fine = formats.offer_of("gguf", "Q4_0"), formats.offer_of("gguf", "Q8_0")

    def plain(name: str, tensor: Tensor) -> Offer | None:
        return None if tensor.dim() < 2 else fine if name in (_TABLE, _HEAD) else coarse

    near = perplexity(formats.rounded(model, plain))
    whole = [one for one in known.tensors if one.tensor.dim() == 2]
    rest = sum(4 * one.tensor.numel() for one in known.tensors if one.tensor.dim() < 2)
    nbytes = rest + sum(formats.bytes_of([one], plain(one.name, one.tensor) or fine) for one in whole)
    start = time.process_time()
    ours, taken, counts = formats.within(known, nbytes)
    seconds = time.process_time() - start
    bits = 8 * taken / sum(one.tensor.numel() for one in known.tensors)
    parts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in sorted(counts.items()))
    return Row(
        *("SmolLM2", f"mixed GGUF ({parts})", bits, taken, "perplexity", exact, near, perplexity(ours)),
        *(_BARS["mixed"], seconds),
    )
