"""What is fitted to a size has it in the runtime's own files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pared

pytestmark = pytest.mark.slow

SIZES = {"gguf": 120_000, "compressed-tensors": 230_000, "gptq": 215_000, "gptq_v2": 215_000, "mlx": 130_000}


@pytest.mark.parametrize("target", SIZES)
def test_files_are_within_the_size(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"vocab_size": 320, "use_cache": False, "architectures": ["LlamaForCausalLM"]},
    )
    model: Any = LlamaForCausalLM(config)
    model.eval()
    batches = [{"input_ids": torch.randint(3, 300, (1, 32))} for _ in range(2)]
    small = pared.fit(model, pared.PostTrainingQuantConfig(target=target, max_size=SIZES[target]), batches, quiet=True)
    written = pared.export(small, tmp_path / ("model.gguf" if target == "gguf" else "out"), to=target)
    assert 0.6 * SIZES[target] < written.nbytes <= SIZES[target]
