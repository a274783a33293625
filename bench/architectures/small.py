"""Small models of the architectures of transformers: a table of sizes for configurations, another of inputs.

No architecture has lines of its own: what neither table covers is not measured, and is listed as such.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY: Final = 512
BATCH: Final = 2
TOKENS: Final = 16
IMAGE: Final = 64
MAX_PARAMETERS: Final = 6_000_000

Sizes = tuple[tuple[int | None, str], ...]

# Names of attributes of a configuration, and their value in a small model; None: as it is. The first row that matches
# counts, and only whole numbers above the value are changed.
SIZES: Final[tuple[tuple[int | None, str], ...]] = (
    (None, "*dropout* *token* *_id *_index *_offset *kernel* *feature_layer num_labels num_feat_extract_layers"),
    (None, "num_channels in_chans *input_channels audio_channels num_feature_levels original_max_position_embeddings"),
    (8, "num_filters rotary_dim"),
    (IMAGE, "image_size img_size pretrain_image_size resolution"),
    (32, "mamba_d_head mamba_head_dim"),
    (2, "num_kv_heads *num_key_value_heads num_query_groups"),
    (16, "*head_dim d_kv kv_channels *_key_dim attention_head_size attention_key_size dim_head"),
    (4, "*heads n_head nhead *num_heads_*"),
    (2, "*layer *layers n_layer *depth *num_blocks num_hidden_groups"),
    (128, "*intermediate_size* *ffn_dim* *d_ff* d_inner n_inner *ffn_hidden_size* *mlp_dim*"),
    (128, "*ff_dim* *feed*forward* *linear_units*"),
    (4, "*num_experts *n_experts *local_experts *routed_experts"),
    (2, "*experts_per_tok moe_topk moe_k top_k_experts num_selected_experts *top_k"),
    (1, "*n_group *topk_group *shared_experts"),
    (VOCABULARY, "*vocab_size* *n_vocab* *num_embeddings* *codebook_size* *n_codes*"),
    (160, "*max_position_embeddings *n_positions *n_ctx *source_positions *target_positions"),
    (160, "*max_seq_len* *context_length"),
    (48, "embed_dim"),
    (64, "hidden_size codebook_dim d_model n_embd hidden_dim emb_dim dim embedding_size *_hidden_size *_embed_dim"),
    (64, "*width"),
    (32, "*projection_dim *proj_dim *output_dim *lora_rank *_channel *_channels classifier_proj_size"),
    (8, "*num_queries num_latents *query_length num_query_tokens"),
)
# For configurations whose sizes depend on one another: only fewer layers and words.
SHALLOW: Final = tuple(row for row in SIZES if row[0] in (None, VOCABULARY) or "*layers" in row[1])
# Lists of widths are divided, lists of depths are cut to at most two layers each, lists of kinds to two layers.
NARROWER: Final = 8
WIDTHS: Final = "*hidden_sizes embed_dim embed_dims *_channels *_dims conv_dim backbone_channel_list"
DEPTHS: Final = "*depths blocks_per_stage stage_num_blocks stage_numb_of_layers num_blocks_per_stage layers"
KINDS: Final = "*layer_types *layers_block_type *indexer_types *no_rope_layers *layers_pattern *attention_types"
# What a configuration computes by itself.
COMPUTED: Final = (
    *("transformers_version", "id2label", "label2id", "architectures", "dtype", "torch_dtype", "problem_type"),
    *("stage_names", "out_features", "out_indices"),
)

# The first table that knows the configuration gives the class.
TASKS: Final = (
    *("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "CTC", "IMAGE_CLASSIFICATION"),
    *("OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "MASK_GENERATION"),
    *("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "ZERO_SHOT_IMAGE_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION"),
    *("VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION", "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM", "KEYPOINT_DETECTION"),
    *("TIME_SERIES_PREDICTION", "PRETRAINING"),
)


@dataclass(frozen=True)
class Small:
    """A small model with random weights, in eval mode, and a call of it."""

    model: Any  # a PreTrainedModel
    call: Mapping[str, Any]


class NotSmallError(Exception):
    """No small model of the architecture could be made and called; the message says why."""


def architectures() -> list[str]:
    """The model types of transformers that have a model class."""
    known = set(modeling_auto.MODEL_MAPPING_NAMES)
    known.update(*(_classes(task) for task in TASKS))
    return sorted(known & set(CONFIG_MAPPING))


def small(name: str, seed: int = 0) -> Small:
    """Make a small model of an architecture, and a call that it answers.

    Raises:
        NotSmallError: none could be made.
    """
    reasons = []
    for sizes in (SIZES, SHALLOW, ()):
        try:
            return _attempt(name, sizes, seed)
        except Exception as error:  # noqa: BLE001, PERF203  # whatever a constructor or a forward says against the sizes
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    raise NotSmallError("; ".join(dict.fromkeys(reasons)))


def call_of(model: Any, seed: int = 0) -> dict[str, Any]:
    """Arguments for a call: those that `forward` requires, and the inputs that its class names."""
    generator = torch.Generator().manual_seed(seed)
    found = inspect.signature(model.forward).parameters
    config = model.config
    required = {n for n, p in found.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    main = model.main_input_name if isinstance(model.main_input_name, str) else model.main_input_name[0]
    wanted = (required | {main}) & set(found)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in found:
        wanted.add("decoder_input_ids")
    if "input_ids" in wanted and "pixel_values" in found and hasattr(model, "logit_scale"):
        wanted.add("pixel_values")
    missing = sorted(wanted - INPUTS.keys())
    if missing:
        raise NotSmallError(f"no input is known for {', '.join(missing)}")
    return {name: INPUTS[name](config, generator) for name in sorted(wanted)}


def _attempt(name: str, sizes: Sizes, seed: int) -> Small:
    config_class = CONFIG_MAPPING[name]
    kwargs = _walk(_plain(config_class().to_dict()), sizes) if sizes else _plain(config_class().to_dict())
    kwargs.pop("model_type", None)
    model_class = _class_of(name)
    if "is_decoder" in kwargs and model_class.__name__.endswith(("CausalLM", "LMHead", "Decoder", "LMHeadModel")):
        kwargs["is_decoder"] = True
    config = config_class(**kwargs)
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > MAX_PARAMETERS:
        raise NotSmallError(f"it has {size:,} parameters")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    _spread(model)
    call = call_of(model, seed)
    with torch.no_grad():
        model(**call)
    return Small(model, call)


def _spread(model: nn.Module) -> None:
    """Give the weights the spread of trained ones: biases and scales are not all 0 and 1, and no layer adds nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                fan = parameter[0].numel() if parameter.dim() > 1 else 400
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * min(0.1, fan**-0.5)
                )


def _classes(task: str) -> Mapping[str, Any]:
    table: Mapping[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    return table


def _class_of(name: str) -> type[nn.Module]:
    for table in (*(map(_classes, TASKS)), modeling_auto.MODEL_MAPPING_NAMES):
        if name in table:
            first = table[name] if isinstance(table[name], str) else table[name][0]
            found: type[nn.Module] = getattr(transformers, first)
            return found
    raise NotSmallError("it has no model class")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Without what a configuration computes by itself."""
    computed = (*COMPUTED, "head_dim") if "qk_rope_head_dim" in config else COMPUTED
    plain = {
        k: _plain(v) if isinstance(v, dict) else v for k, v in config.items() if k not in computed and v is not None
    }
    return plain | ({"vocab_size": VOCABULARY} if "vocab_size" in config and config["vocab_size"] is None else {})


def _walk(config: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The configuration with small sizes, and that of each of its parts."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            made[key] = _walk(value, sizes)
            if key == "rope_parameters" and "rope_type" in value:
                made[key]["mrope_section"] = [2, 3, 3]  # half of a head's 16 dimensions; ignored where it is not used
        elif isinstance(value, int) and not isinstance(value, bool):
            made[key] = min(value, _small_value(key, value, sizes))
        elif isinstance(value, float) and key.endswith(("width_coefficient", "depth_coefficient")):
            made[key] = 0.3
        elif isinstance(value, (list, tuple)) and value:
            made[key] = _small_list(key, list(value))
        else:
            made[key] = value
        if key.endswith(("_token_id", "token_index")) and isinstance(made[key], int):
            made[key] = min(made[key], VOCABULARY - 1 - sum(map(ord, key)) % 20)
    return made


def _small_list(key: str, value: list[Any]) -> list[Any]:
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if _matches(key, KINDS) and len(value) > 2:
        return [value[0], next((v for v in value if v != value[0]), value[0])]
    if key == "embed_dim_per_stage":
        return [2 * v // 3 for v in value]  # 96 becomes 64, the size of other models
    if whole and key not in ("in_channels", "out_channels") and _matches(key, WIDTHS) and min(value) >= 16:
        return [max(8, v // NARROWER) for v in value]
    if whole and _matches(key, DEPTHS):
        return [min(v, 2) for v in value]
    return value


def _small_value(key: str, value: int, sizes: Sizes) -> int:
    found = next((size for size, names in sizes if _matches(key, names)), None)
    return value if found is None else found


def _matches(key: str, names: str) -> bool:
    return any(fnmatchcase(key, name) for name in names.split())


def _found(config: Any, *names: str, default: int) -> int:
    """The first of these attributes that the configuration or a part of it has."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and value > 0:
                return value
    return default


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    words = _found(config, "vocab_size", default=VOCABULARY)
    low, high = (5, words - 40) if words > 100 else (1, words)  # special tokens stand at both ends
    tokens = torch.randint(low, high, (BATCH, TOKENS), generator=generator)
    for special in ("question_token_id", "eos_token_id"):
        if isinstance(value := getattr(config, special, None), int) and 0 <= value < VOCABULARY:
            tokens[:, 1 if special == "question_token_id" else -1] = value
    return tokens


def _image(config: Any, generator: torch.Generator) -> Tensor:
    size, channels = _found(config, "image_size", "img_size", default=IMAGE), _found(config, "num_channels", default=3)
    return torch.randn(BATCH, channels, size, size, generator=generator)


def _video(config: Any, generator: torch.Generator) -> Tensor:
    frames = _found(config, "num_frames", default=4)
    return torch.stack([_image(config, generator) for _ in range(frames)], 1)


def _sound(config: Any, generator: torch.Generator) -> Tensor:
    channels = (config.audio_channels,) if hasattr(config, "audio_channels") else ()
    return torch.randn(BATCH, *channels, 4000, generator=generator)


def _spectrum(config: Any, generator: torch.Generator) -> Tensor:
    bands = _found(config, "num_mel_bins", "feature_size", "input_feat_per_channel", default=80)
    if positions := getattr(config, "max_source_positions", 0):
        return torch.randn(BATCH, bands, 2 * positions, generator=generator)
    return torch.randn(BATCH, 64, bands, generator=generator)


def _boxes(_: Any, generator: torch.Generator) -> Tensor:
    corners = torch.randint(0, 100, (BATCH, TOKENS, 2), generator=generator)
    return corners.repeat(1, 1, 2).sort(-1).values


INPUTS: Final[dict[str, Callable[[Any, torch.Generator], Any]]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "attention_mask": lambda *_: torch.ones(BATCH, TOKENS, dtype=torch.long),
    "bbox": _boxes,
    "pixel_values": _image,
    "pixel_values_videos": _video,
    "pixel_mask": lambda *_: torch.ones(BATCH, IMAGE, IMAGE, dtype=torch.long),
    "input_values": _sound,
    "input_features": _spectrum,
}
