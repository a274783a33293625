"""The families that are known, and the one that a configuration belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pared.errors import ConfigError
from pared.targets.families.family import Family, Link

_LAYER: Final = "model.layers.{block}."


def _gated(before: str) -> tuple[Link, ...]:
    """The links of decoders with gated layers, whose norm in front of the gate is called `before`."""
    attention = tuple(f"{_LAYER}self_attn.{name}_proj" for name in "qkv")
    gated = tuple(f"{_LAYER}mlp.{name}_proj" for name in ("gate", "up"))
    return (
        Link(f"{_LAYER}input_layernorm", attention),
        Link(f"{_LAYER}{before}", gated),
        Link(f"{_LAYER}mlp.up_proj", (f"{_LAYER}mlp.down_proj",), norm=False),
        Link(f"{_LAYER}self_attn.v_proj", (f"{_LAYER}self_attn.o_proj",), heads=True, norm=False),
    )


_LLAMA: Final = _gated("post_attention_layernorm")
_GEMMA_2: Final = _gated("pre_feedforward_layernorm")
_ROTARY: Final = (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads"))
_TABLES: Final = ("model.rotary_emb.", "rotary_emb.inv_freq")

FAMILIES: Final[tuple[Family, ...]] = (
    Family("Llama", ("LlamaForCausalLM",), "LLAMA", _LLAMA, _ROTARY, unused=_TABLES),
    Family("Mistral", ("MistralForCausalLM",), "LLAMA", _LLAMA, _ROTARY, unused=_TABLES),
    Family("Qwen2", ("Qwen2ForCausalLM",), "QWEN2", _LLAMA, unused=_TABLES),
    Family("Qwen3", ("Qwen3ForCausalLM",), "QWEN3", _LLAMA, unused=_TABLES),
    Family("Gemma", ("GemmaForCausalLM",), "GEMMA", _LLAMA, norm_offset=1.0, unused=_TABLES),
    Family("Gemma 2", ("Gemma2ForCausalLM",), "GEMMA2", _GEMMA_2, norm_offset=1.0, unused=_TABLES),
    Family("Gemma 3", ("Gemma3ForCausalLM",), "GEMMA3", _GEMMA_2, norm_offset=1.0, unused=_TABLES),
    Family(
        "Phi-3",
        ("Phi3ForCausalLM",),
        "PHI3",
        (
            Link(f"{_LAYER}input_layernorm", (f"{_LAYER}self_attn.qkv_proj",)),
            Link(f"{_LAYER}post_attention_layernorm", (f"{_LAYER}mlp.gate_up_proj",)),
        ),
        unused=_TABLES,
    ),
    Family(
        "GPT-2",
        ("GPT2LMHeadModel",),
        "GPT2",
        (
            Link("transformer.h.{block}.ln_1", ("transformer.h.{block}.attn.c_attn",)),
            Link("transformer.h.{block}.ln_2", ("transformer.h.{block}.mlp.c_fc",)),
        ),
        transposed=("c_attn", "c_proj", "c_fc"),
        unused=(".attn.bias", ".attn.masked_bias"),
    ),
    Family(
        "BERT",
        ("BertModel",),
        "BERT",
        (
            Link(
                "encoder.layer.{block}.attention.self.value",
                ("encoder.layer.{block}.attention.output.dense",),
                heads=True,
                norm=False,
            ),
        ),
        prefixes=("bert.",),
        unused=("embeddings.position_ids", "pooler."),
        output="states",
    ),
)


def architectures() -> list[str]:
    """All architectures of all families, as config.json names them."""
    return [name for family in FAMILIES for name in family.architectures]


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a model.

    Args:
        config: the content of config.json.
        where: for messages.

    Raises:
        ConfigError: its architecture is not known.

    >>> family_of({"architectures": ["Qwen2ForCausalLM"]}).name
    'Qwen2'
    """
    found = config.get("architectures") or []
    wanted = [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
    for family in FAMILIES:
        if set(wanted) & set(family.architectures):
            return family
    raise ConfigError(
        f"the architecture {' or '.join(wanted) or '(none is named)'} is not known",
        where=where,
        remedy=f"Known are {', '.join(architectures())}. Targets that hold a graph, such as onnx and openvino, take "
        "every architecture.",
    )
