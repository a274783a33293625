"""Small language models in folders, as transformers writes them, and texts' worth of tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pared import readers
from pared.executors.executor import Executor, LocalExecutor
from pared.fitting.calibration.logits import known_logits
from pared.fitting.hugging_face.loading import skeleton_in
from pared.fitting.streamed.parts.blocks import find_blocks
from pared.fitting.streamed.parts.weights import weights_of
from pared.fitting.streamed.store import Store
from pared.fitting.streamed.sweeps import Sweeps
from pared.model.calls import Call
from pared.model.outputs import Leaf
from pared.model.tensors import find_tensors

VOCABULARY = 96
_EXPERTS: dict[str, dict[str, int]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 24},
}


def small(kind: str, *, tied: bool = False, layers: int = 4) -> nn.Module:
    """A model with random weights, in float32."""
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2}
    if kind == "GPT2":
        config = transformers.GPT2Config(n_embd=32, n_layer=layers, n_head=4, n_positions=64, vocab_size=VOCABULARY)
    elif kind in _EXPERTS:
        more = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_experts_per_tok": 2, **_EXPERTS[kind]}
        config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    elif kind == "Llava":  # of two models with a configuration each
        text = transformers.LlamaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=64)
        seeing = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        pixels = transformers.CLIPVisionConfig(**seeing, image_size=28, patch_size=14)
        config = transformers.LlavaConfig(text_config=text, vision_config=pixels, image_token_index=VOCABULARY - 1)
        return scaled(transformers.LlavaForConditionalGeneration(config))
    elif kind == "Jamba":  # blocks of two classes
        more = {"vocab_size": VOCABULARY, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        config = transformers.JambaConfig(**sizes, **more, mamba_dt_rank=4, use_mamba_kernels=False)
    elif kind == "Gemma2":
        config = transformers.Gemma2Config(**sizes, head_dim=8, vocab_size=VOCABULARY, sliding_window=4)
    else:
        config = getattr(transformers, f"{kind}Config")(
            **sizes, vocab_size=VOCABULARY, tie_word_embeddings=tied, max_position_embeddings=64
        )
    return scaled(transformers.AutoModelForCausalLM.from_config(config))


def scaled(model: nn.Module) -> nn.Module:
    """The model with larger weights, in eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # so that blocks change the stream
    return model.eval()


def written(model: Any, folder: Path, *, shards: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """The model's folder."""
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")
    model.float()
    return folder


def some_calls(count: int, length: int = 12) -> list[Call]:
    """Calls with random tokens."""
    generator = torch.Generator().manual_seed(1)
    return [
        Call((), {"input_ids": torch.randint(0, VOCABULARY, (1, length), generator=generator)}) for _ in range(count)
    ]


@contextmanager
def sweeps_of(
    folder: Path,
    workspace: Path,
    calls: list[Call],
    *,
    dtype: str = "float32",
    every: int = 1,
    executor: Executor | None = None,
) -> Iterator[Sweeps]:
    """The sweeps over a folder's model."""
    tensors = find_tensors(skeleton_in(folder))
    workspace.mkdir(exist_ok=True)
    with readers.open_listing(folder) as listing:
        weights, store = weights_of(tensors, listing), Store(workspace)
        on = executor or LocalExecutor()
        blocks = find_blocks(tensors)
        yield Sweeps(weights, blocks, calls, store, 0, logits_of, dtype, every, inputs=True, executor=on)


def logits_of(model: nn.Module, leaves: list[Leaf]) -> frozenset[str]:
    return known_logits(model, leaves, "auto")
