"""Rotary positions: what llama.cpp reads from metadata, and the factors that it reads from tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import gguf
import numpy as np

from pared.errors import ConfigError
from pared.formats.groups.grid import Floats

_BASE: Final = 10_000.0
_KINDS: Final = ("default", "linear", "yarn", "llama3", "longrope")


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of rotary positions, also of configurations that write them as transformers did before version 5.

    Of a model whose layers differ, those of layers that attend to everything.

    Raises:
        ConfigError: they are of a kind that GGUF has no place for.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = dict(found.get("full_attention", found))
    found.setdefault("rope_theta", config.get("rope_theta") or _BASE)
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    if found["rope_type"] not in _KINDS:
        raise ConfigError(
            f"rotary positions of the kind {found['rope_type']!r} cannot be written",
            where="config.json",
            remedy=f"GGUF files hold {', '.join(_KINDS)}.",
        )
    return found


def head_size(config: Mapping[str, Any]) -> int:
    """The width of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def add_rope(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """Write them as metadata."""
    rope = rope_of(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    base = local.get("rope_theta") or config.get("rope_local_base_freq")
    if base:
        writer.add_rope_freq_base_swa(float(base))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(_original(rope, config)))
    if rope["rope_type"] == "longrope":
        original = _original(rope, config)
        writer.add_rope_scaling_orig_ctx_len(int(original))
        scale = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)


def _original(rope: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    for held in (rope, config):
        if held.get("original_max_position_embeddings"):
            return float(held["original_max_position_embeddings"])
    return float(config["max_position_embeddings"])


def factors(config: Mapping[str, Any]) -> dict[str, Floats]:
    """Tensors that divide the frequencies, float32 by their names in the file; most models have none."""
    rope = rope_of(config)
    if rope["rope_type"] == "longrope":
        long, short = (np.asarray(rope[f"{which}_factor"], np.float32) for which in ("long", "short"))
        return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    return {"rope_freqs.weight": _llama_3(rope, config)} if rope["rope_type"] == "llama3" else {}


def _llama_3(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Floats:
    """Low frequencies are divided by a factor, high ones are not, and those between in between (Llama 3.1)."""
    size = head_size(config)
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (np.arange(0, size, 2) / size)
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _original(rope, config)
    share = np.clip((original / waves - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - share) / factor + share), np.float32)
