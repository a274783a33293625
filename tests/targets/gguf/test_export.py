"""`pared.export` of quantized models to GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import pared
from pared.errors import ConfigError
from pared.targets.table import TARGETS
from tests.targets.families.models import built
from tests.targets.gguf.folders import folder_with
from tests.targets.quantized import in_format, in_rows, quantized_as

pytestmark = pytest.mark.slow
_GGUF = TARGETS["gguf"]


def held(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {
        one.name: (one.tensor_type.name, gguf.quants.dequantize(one.data, one.tensor_type)) for one in reader.tensors
    }


@pytest.mark.parametrize("family", ["Qwen2", "GPT-2"])
def test_what_was_fitted_for_it_goes_as_it_is(family: str, tmp_path: Path) -> None:
    model = quantized_as(built(family), in_format(_GGUF, "Q4_0"))
    folder_with(tmp_path / "source", "qwen2", built(family).config.to_dict())
    done = pared.export(model, tmp_path / "q.gguf", to="gguf", folder=tmp_path / "source")
    assert done.path == tmp_path / "q.gguf"
    assert done.nbytes == done.path.stat().st_size
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH["QWEN2" if family == "Qwen2" else "GPT2"], 2)
    found = held(done.path)
    for name, parameter in model.named_parameters():
        kind, values = found[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        transposed = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and parameter.ndim == 2
        assert np.array_equal(values, (parameter.T if transposed else parameter).numpy()), name
        assert kind == ("Q4_0" if name in done.codes else "F32")
    assert len(done.codes) == 15 if family == "Qwen2" else 9
    assert "tokenizer.ggml.tokens" in gguf.GGUFReader(done.path).fields


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (5, "Q5_0"), (4, "Q4_0")])
def test_a_step_for_each_row_that_is_representable_goes_exactly(bits: int, kind: str, tmp_path: Path) -> None:
    model = quantized_as(built("Llama"), in_rows(bits))
    pared.export(model, tmp_path, to="gguf")
    found = held(tmp_path / "model.gguf")
    assert {one for one, _ in found.values()} == {kind, "F32"}
    expected = dict(model.named_parameters())["model.layers.1.mlp.down_proj.weight"]
    assert np.array_equal(found["blk.1.ffn_down.weight"][1], expected.numpy())


def test_other_steps_are_refused_before_any_work(tmp_path: Path) -> None:
    model = quantized_as(built("Llama"), in_rows(8, rounded=False))
    with pytest.raises(
        ConfigError, match=r"15 of 20 tensors cannot be held exactly: model.embed_tokens.weight has steps"
    ):
        pared.export(model, tmp_path, to="gguf")
    assert not list(tmp_path.iterdir())


def test_a_model_of_ones_own_is_refused(tmp_path: Path) -> None:
    model = quantized_as(nn.Sequential(nn.Linear(32, 32)), in_rows(8))
    with pytest.raises(ConfigError, match="the architecture .none is named. is not known"):
        pared.export(model, tmp_path, to="gguf")


def test_a_graph_needs_inputs_and_a_target_must_be_known(tmp_path: Path) -> None:
    model = quantized_as(nn.Sequential(nn.Linear(32, 32)), in_rows(8))
    with pytest.raises(ConfigError, match="captured from a call, and there are no inputs"):
        pared.export(model, tmp_path)
    with pytest.raises(ConfigError, match="to='ggml'"):
        pared.export(model, tmp_path, torch.ones(1, 32), to="ggml")
