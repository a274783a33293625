"""The types of models that mlx-lm loads: https://github.com/ml-explore/mlx-lm, mlx_lm/models and mlx_lm/utils.py."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from pared.errors import ConfigError

VERSION: Final = "0.32.2"  # of mlx-lm, whose types these are

# By `model_type` of config.json: the modules of mlx_lm/models that have a class `Model`.
LOADED: Final = frozenset(
    ("Klear", "afm7", "afmoe", "apertus", "baichuan_m1", "bailing_hybrid", "bailing_moe", "bailing_moe_linear",
     "bailing_moe_v3", "bitnet", "cohere", "cohere2", "dbrx", "deepseek", "deepseek_v2", "deepseek_v3",
     "deepseek_v32", "deepseek_v41", "dots1", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe",
     "falcon_h1", "gear", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "gemma4_text", "glm",
     "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj",
     "granite", "granitemoe", "granitemoehybrid", "helium", "hunyuan", "hunyuan_v1_dense", "internlm2", "internlm3",
     "iquestloopcoder", "jamba", "kimi_k25", "kimi_k3", "kimi_linear", "kimi_vl", "laguna", "lfm2", "lfm2-vl",
     "lfm2_moe", "lille-130m", "llama", "llama4", "llama4_text", "longcat_flash", "longcat_flash_ngram", "mamba",
     "mamba2", "mellum", "mimo", "mimo_v2_flash", "minicpm", "minicpm3", "minimax", "minimax_m3_vl", "ministral3",
     "mistral3", "mistral4", "mixtral", "muse_glimmer", "muse_spark", "nanbeige", "nanochat", "nemotron",
     "nemotron-nas", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openelm", "phi", "phi3",
     "phi3small", "phimoe", "phixtral", "pixtral", "plamo", "plamo2", "plamo3", "prism_hadamard_qwen35", "qwen",
     "qwen2", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl",
     "qwen3_vl_moe", "recurrent_gemma", "rwkv7", "seed_oss", "smollm3", "solar_open", "spark2_5", "stablelm",
     "starcoder2", "step3p5", "talkie", "telechat3", "youtu_llm")
) | frozenset(  # `MODEL_REMAPPING` of mlx_lm/utils.py: these run as one of the others
    ("deepseek_v41_text", "falcon_mamba", "gemma4_unified", "iquestcoder", "joyai_llm_flash", "kimi_k2", "llava",
     "minimax_m2", "mistral", "phi-msft", "qwen2_5_vl", "xverse")
)  # fmt: skip


def check_loaded(config: Mapping[str, Any]) -> None:
    """Refuse a model that mlx-lm would not load: neither the version above nor one that is installed here.

    Args:
        config: the content of config.json. One that names code of its own (`model_file`) is taken.

    Raises:
        ConfigError: mlx-lm has no loader for its type.

    >>> check_loaded({"model_type": "qwen3"})
    """
    kind = config.get("model_type")
    if config.get("model_file") or (isinstance(kind, str) and (kind in LOADED or _is_installed(kind))):
        return
    raise ConfigError(
        f"mlx-lm has no loader for models of type {kind}" if kind else "it has no model_type, which mlx-lm reads",
        where="config.json",
        remedy=f'Use the target "onnx" or "openvino". mlx-lm {VERSION} loads llama, mistral, qwen3, gemma3, phi3 and '
        "others; a newer one that is installed here is asked, too.",
    )


def _is_installed(kind: str) -> bool:
    """Whether the mlx-lm of this environment, if there is one, has a module for a type; it is not imported."""
    found = find_spec("mlx_lm")
    if found is None or Path(kind).name != kind:
        return False
    return any((Path(place) / "models" / f"{kind}.py").is_file() for place in found.submodule_search_locations or ())
