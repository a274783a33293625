"""Checkpoints written as GGUF files, without the model's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

import pared
from pared.checkpoints.runtimes import choosing
from pared.errors import ConfigError
from tests.checkpoints.runtimes.test_writing import checkpoint
from tests.targets.sources import CONFIG

pytestmark = pytest.mark.slow


def decoded(path: Path) -> dict[str, np.ndarray]:
    return {one.name: dequantize(one.data, one.tensor_type) for one in GGUFReader(path).tensors}


def error(found: np.ndarray, exact: np.ndarray) -> float:
    exact = exact.astype(np.float32)
    return float(np.square(found.reshape(exact.shape) - exact).sum() / np.square(exact).sum())


def test_a_llama_keeps_its_weights(tmp_path: Path) -> None:
    given = checkpoint(tmp_path / "given")
    (tmp_path / "given/tokenizer.json").unlink()
    most = 200_000
    pared.compress(tmp_path / "given", tmp_path / "out", target="gguf", max_size=most)
    (file,) = (tmp_path / "out").iterdir()
    assert 0.85 * most < file.stat().st_size <= most
    found = decoded(file)
    for ours, theirs in (
        ("mlp.down_proj", "ffn_down"),
        ("mlp.up_proj", "ffn_up"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.v_proj", "attn_v"),
    ):
        for i in range(2):
            assert error(found[f"blk.{i}.{theirs}.weight"], given[f"model.layers.{i}.{ours}.weight"]) < 0.03
    assert error(found["token_embd.weight"], given["model.embed_tokens.weight"]) < 0.03
    assert error(found["output.weight"], given["lm_head.weight"]) < 0.03


@pytest.mark.parametrize("goal", [{"bits": 8.5}, {"max_size": 10**6}])  # blocks; floats
def test_transposed_matrices_are_rounded_along_their_inputs(goal: dict[str, Any], tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "given")
    pared.compress(tmp_path / "given", tmp_path / "out", target="gguf", **goal)
    (file,) = (tmp_path / "out").iterdir()
    found = decoded(file)
    exact = model.transformer.h[1].attn.c_attn.weight.detach().numpy()
    assert error(found["blk.1.attn_qkv.weight"], exact.T) < 0.01
    assert error(found["position_embd.weight"], model.transformer.wpe.weight.detach().numpy()) == 0


def test_what_llama_cpp_does_not_run_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "given", {**CONFIG, "hidden_act": "relu"})
    monkeypatch.setattr(choosing, "rounded", None)
    with pytest.raises(ConfigError, match="the activation is 'relu'"):
        pared.compress(tmp_path / "given", tmp_path / "out", target="gguf", bits=5)
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "given", {**CONFIG, "architectures": ["StrangeForCausalLM"]})
    with pytest.raises(ConfigError, match="StrangeForCausalLM is not known"):
        pared.compress(tmp_path / "given", tmp_path / "out", target="gguf", bits=5)
    assert not (tmp_path / "out").exists()


def test_a_number_beyond_float16_is_refused_where_no_sample_shows_it(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).standard_normal((4096, 64)).astype(np.float32)
    numbers[77, 5] = 1e5  # its row is not sampled
    given = checkpoint(tmp_path / "first")
    config = {**CONFIG, "vocab_size": 4096}
    checkpoint(tmp_path / "given", config, {**given, "model.embed_tokens.weight": numbers})
    (tmp_path / "given/tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="embed_tokens.weight: holds numbers up to 1e.05, which F16 cannot hold"):
        pared.compress(tmp_path / "given", tmp_path / "out", target="gguf", bits=16.5)
    assert not (tmp_path / "out").exists()
