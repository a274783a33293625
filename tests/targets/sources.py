"""Small models to write for runtimes, with random numbers on the grids of their formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from pared.formats.dtypes import ELEMENTS, Array
from pared.formats.groups.grid import GroupGrid, Numbers, representable
from pared.targets.pieces import Outline, Source
from pared.targets.target import Offer, Role

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 32,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "dtype": "bfloat16", "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}  # fmt: skip


def random_parts(grid: GroupGrid, rows: int, columns: int, seed: int = 0) -> dict[str, Numbers]:
    """Every code occurs, steps differ, and zero points are of all kinds but the least code."""
    random = np.random.default_rng(seed)
    shapes = grid.shapes(rows, columns)
    size = 0.4 / (1 << grid.bits)
    step = representable((size * (0.5 + random.random(shapes["step"]))).astype(np.float32), grid.step)
    parts: dict[str, Numbers] = {
        "codes": random.integers(grid.low, grid.high + 1, shapes["codes"]).astype(np.int8),
        "step": step,
    }
    if grid.zero == "code":
        parts["zero"] = random.integers(grid.low + 1, grid.high + 1, shapes["zero"]).astype(np.int8)
    if grid.zero == "least":
        least = step * grid.low * random.random(shapes["least"]).astype(np.float32)
        parts["least"] = representable(least, grid.step)
    return parts


def llama_shapes(config: Mapping[str, Any] = CONFIG) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of a small Llama."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    inside = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in inside.items()}
    return {**found, "model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}


def role_of(name: str, shape: tuple[int, ...]) -> Role:
    if len(shape) < 2:
        return "other"
    return "table" if "embed" in name else "head" if "head" in name else "linear"


class Random:
    """A source of random numbers; `values` are what the runtime has to make of each tensor, float32."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        offer_of: Callable[[str, Role], Offer | None],
        config: Mapping[str, Any] = CONFIG,
        dtype: str = "bfloat16",
        parts_of: Callable[[GroupGrid, int, int, int], dict[str, Numbers]] = random_parts,
    ) -> None:
        self.parts: dict[str, dict[str, Numbers]] = {}
        self.values: dict[str, Array] = {}
        outlines = []
        for seed, (name, shape) in enumerate(shapes.items()):
            role = role_of(name, shape)
            offer = offer_of(name, role)
            outlines.append(Outline(name, shape, role, offer, dtype))
            if offer is not None:
                self.parts[name] = parts_of(offer.grid, shape[0], shape[1], seed)
                self.values[name] = offer.grid.decode(self.parts[name])
            else:
                numbers = np.random.default_rng(seed).standard_normal(shape) * 0.1 + (len(shape) == 1)
                stored = numbers.astype(ELEMENTS[dtype])
                self.parts[name] = {"values": stored}
                self.values[name] = stored.astype(np.float32)
        self.read: list[str] = []
        self.source = Source(outlines, self._read, config)

    def _read(self, outline: Outline) -> Mapping[str, Numbers]:
        self.read.append(outline.name)
        return self.parts[outline.name]


def named(offers: Iterable[Offer], name: str) -> Offer:
    return next(offer for offer in offers if offer.name == name)
