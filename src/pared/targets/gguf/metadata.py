"""What llama.cpp must know about a model besides its tensors, from Hugging Face's config.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

from pared.errors import ConfigError
from pared.formats.groups.grid import Floats
from pared.targets.families.family import Family
from pared.targets.gguf.layout import Entry
from pared.targets.gguf.rope import add_rope, factors, head_size
from pared.targets.pieces import Source
from pared.version import __version__

_Config = Mapping[str, Any]


@dataclass(frozen=True)
class _Settings:
    """What an architecture needs.

    Args:
        activations: those that llama.cpp runs for it, as config.json calls them.
        also: writes what only some architectures have.
        rotary: whether it has rotary positions.
    """

    activations: tuple[str, ...]
    also: Callable[[gguf.GGUFWriter, _Config], None] = lambda _writer, _config: None
    rotary: bool = True


# By the writer's method: the setting, by all of its names.
_NUMBERS: Final[Mapping[str, tuple[str, ...]]] = {
    "add_context_length": ("max_position_embeddings", "n_positions"),
    "add_embedding_length": ("hidden_size", "n_embd"),
    "add_block_count": ("num_hidden_layers", "n_layer"),
    "add_head_count": ("num_attention_heads", "n_head"),
    "add_head_count_kv": ("num_key_value_heads", "num_attention_heads", "n_head"),
}
_OPTIONAL: Final[Mapping[str, tuple[str, ...]]] = {
    "add_layer_norm_rms_eps": ("rms_norm_eps",),
    "add_layer_norm_eps": ("layer_norm_eps", "layer_norm_epsilon"),
    "add_key_length": ("head_dim",),
    "add_value_length": ("head_dim",),
}


def _rope_dimensions(writer: gguf.GGUFWriter, config: _Config) -> None:
    rope = config.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    writer.add_rope_dimension_count(int(head_size(config) * share))


def _phi_3(writer: gguf.GGUFWriter, config: _Config) -> None:
    _rope_dimensions(writer, config)
    writer.add_sliding_window(config.get("sliding_window") or 0)


def _gemma(writer: gguf.GGUFWriter, config: _Config) -> None:
    """Gemma 2 and 3, whose layers attend to a window in turn."""
    scale = config.get("query_pre_attn_scalar") or head_size(config)
    wide = config["num_hidden_layers"] in (46, 62)  # llama.cpp knows the largest models by their number of blocks
    expected = config["hidden_size"] / config["num_attention_heads"] if wide else head_size(config)
    if scale != expected:
        raise ConfigError(
            f"query_pre_attn_scalar is {scale}, and llama.cpp computes with {expected:g}",
            where="config.json",
            remedy="It cannot run this model.",
        )
    writer.add_sliding_window(config["sliding_window"])
    for name in ("attn", "final"):
        if config.get(f"{name}_logit_softcapping"):
            getattr(writer, f"add_{name}_logit_softcapping")(float(config[f"{name}_logit_softcapping"]))


def _bert(writer: gguf.GGUFWriter, config: _Config) -> None:
    writer.add_causal_attention(False)
    writer.add_token_type_count(config.get("type_vocab_size", 1))


_SETTINGS: Final[Mapping[str, _Settings]] = {
    "LLAMA": _Settings(("silu",), _rope_dimensions),
    "QWEN2": _Settings(("silu",)),
    "QWEN3": _Settings(("silu",)),
    "GEMMA": _Settings(("gelu_pytorch_tanh", "gelu")),
    "GEMMA2": _Settings(("gelu_pytorch_tanh",), _gemma),
    "GEMMA3": _Settings(("gelu_pytorch_tanh",), _gemma),
    "PHI3": _Settings(("silu",), _phi_3),
    "GPT2": _Settings(("gelu_new", "gelu_pytorch_tanh"), rotary=False),
    "BERT": _Settings(("gelu",), _bert, rotary=False),
}
# Types that tell of several kinds of files, of which one is as good as the other.
_FILE_TYPES: Final = {"F32": "ALL_F32", **{f"Q{bits}_K": f"MOSTLY_Q{bits}_K_M" for bits in (3, 4, 5)}}
_POOLINGS: Final = {"pooling_mode_mean_tokens": "MEAN", "pooling_mode_cls_token": "CLS"}


def _setting(config: _Config, names: Sequence[str]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def add_settings(writer: gguf.GGUFWriter, family: Family, config: _Config, table_rows: int) -> None:
    """Write what the architecture needs.

    Args:
        writer: the file of a model of this architecture.
        family: the model's.
        config: the content of config.json.
        table_rows: the number of tokens that the model has a row for.

    Raises:
        ConfigError: the configuration lacks a setting, or llama.cpp does not run what it says.
    """
    settings = _SETTINGS[family.gguf]
    activation = _setting(config, ("hidden_activation", "hidden_act", "activation_function"))
    if activation not in settings.activations:
        raise ConfigError(
            f"the activation is {activation!r}, and llama.cpp runs {' or '.join(settings.activations)}",
            where="config.json",
            remedy="It cannot run this model.",
        )
    for method, names in _NUMBERS.items():
        value = _setting(config, names)
        if value is None:
            raise ConfigError(
                f"has no {names[0]}", where="config.json", remedy="Pass the folder with the model's configuration."
            )
        getattr(writer, method)(int(value))
    for method, names in _OPTIONAL.items():
        if _setting(config, names) is not None:
            getattr(writer, method)(_setting(config, names))
    inner = _setting(config, ("intermediate_size", "n_inner")) or 4 * config["n_embd"]
    writer.add_feed_forward_length(int(inner))
    writer.add_vocab_size(table_rows)
    if settings.rotary:
        add_rope(writer, config)
    settings.also(writer, config)


def extra_tensors(family: Family, config: _Config) -> dict[str, Floats]:
    """Tensors that the source holds as settings, by their names in the file."""
    return factors(config) if _SETTINGS[family.gguf].rotary else {}


def add_general(writer: gguf.GGUFWriter, source: Source, entries: Sequence[Entry]) -> None:
    """Write the model's name and what is known of its origin, the type of most of its bytes, and how it was made."""
    total = sum(int(np.prod(entry.shape)) for entry in entries)
    about = gguf.Metadata.load(None, source.folder, None, total)
    about.name = about.name or str(source.config.get("_name_or_path") or "model")
    about.set_gguf_meta_model(writer)
    writer.add_type(gguf.GGUFType.MODEL)
    sizes: Counter[str] = Counter()
    for entry in entries:
        sizes[entry.type] += entry.nbytes
    most = sizes.most_common(1)[0][0]
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES.get(most, f"MOSTLY_{most}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("quantize.pared.version", __version__)
    for name, value in source.provenance.items():
        writer.add_string(f"quantize.pared.{name}", value if isinstance(value, str) else json.dumps(value, default=str))


def add_pooling(writer: gguf.GGUFWriter, folder: Path) -> None:
    """Write how an encoder's states become one vector, where a folder of sentence-transformers says so."""
    file = folder / "1_Pooling" / "config.json"
    if file.is_file():
        held = json.loads(file.read_text(encoding="utf-8"))
        kind = next((kind for name, kind in _POOLINGS.items() if held.get(name)), None)
        if kind is not None:
            writer.add_pooling_type(gguf.PoolingType[kind])
