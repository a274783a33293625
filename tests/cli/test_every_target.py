"""What the documentation promises: a folder, a text and a target give files that the runtime's own reader takes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import openvino_genai
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from typer.testing import CliRunner

import pared
from pared.cli import app
from pared.targets.table import TARGETS
from tests.runtime.exports import in_onnxruntime, sqnr
from tests.targets.families.models import built
from tests.targets.folders.test_compressed_tensors import opened
from tests.targets.folders.test_gptq import format_of, weight_of
from tests.targets.folders.test_mlx import decoded
from tests.targets.gguf.folders import TEXTS, folder_with

pytestmark = [pytest.mark.slow, pytest.mark.engine]

# One that no runtime joins with another, and whose rows none puts into another order.
_MODULE = "model.layers.0.mlp.down_proj"
# On average: a folder of so small a model is mostly its table, which stays in float there, and entries of tensors.
_BITS = {"gguf": "12", "mlx": "12", "onnx": "12", "openvino": "12"}
Reader = Callable[[Path], np.ndarray]


def _gguf(out: Path) -> np.ndarray:
    held = {one.name: one for one in gguf.GGUFReader(out / "model.gguf").tensors}["blk.0.ffn_down.weight"]
    found: np.ndarray = gguf.quants.dequantize(held.data, held.tensor_type)
    return found


def _transformers(out: Path) -> np.ndarray:
    found: np.ndarray = opened(out, dequantize=True).get_parameter(f"{_MODULE}.weight").detach().float().numpy()
    return found


def _gptq(out: Path) -> np.ndarray:
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    numbers = format_of(said, _MODULE)
    assert numbers is not None
    less = 1 if said["checkpoint_format"] == "gptq" else 0
    return weight_of(load_file(out / "model.safetensors"), _MODULE, numbers["bits"], less)


def _mlx(out: Path) -> np.ndarray:
    said = json.loads((out / "config.json").read_text())["quantization"]
    return decoded(out, _MODULE, said.get(_MODULE, said))


READERS: dict[str, Reader] = {
    "gguf": _gguf,
    "compressed-tensors": _transformers,
    "compressed-tensors-any": _transformers,
    "compressed-tensors-int8": _transformers,
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "mlx": _mlx,
}


@pytest.fixture
def given(tmp_path: Path) -> tuple[Path, Path]:
    """A folder and a text."""
    model: Any = built("Llama", max_position_embeddings=32, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "source")
    folder_with(tmp_path / "source", "smollm", model.config.to_dict())
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS) * 8, encoding="utf-8")
    return tmp_path / "source", text


def fitted(target: str, given: tuple[Path, Path], out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `pared fit`; the model that it has exported."""
    seen: list[Any] = []
    export = pared.export

    def watched(model: Any, *args: Any, **options: Any) -> Any:
        seen.append(model)
        return export(model, *args, **options)

    monkeypatch.setattr(pared, "export", watched)
    folder, text = given
    bits = _BITS.get(target, "20")
    options = ["--calib", str(text), "--target", target, "--bits", bits, "--samples", "4", "-o", str(out), "-q"]
    done = CliRunner().invoke(app, ["fit", str(folder), *options])
    assert done.exit_code == 0, (done.output, done.exception)
    return seen[0]


def test_every_target_is_here() -> None:
    assert set(READERS) == {name for name, target in TARGETS.items() if target.takes == "weights"}


@pytest.mark.filterwarnings("ignore")  # of libraries
@pytest.mark.parametrize("target", READERS)
def test_the_runtimes_reader_finds_what_was_fitted(
    target: str, given: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = fitted(target, given, tmp_path / "out", monkeypatch)
    found = READERS[target](tmp_path / "out")
    expected = small.get_parameter(f"{_MODULE}.weight").detach().float()
    if READERS[target] is _transformers:  # which computes in bfloat16 there
        expected = expected.bfloat16().float()
    assert np.allclose(found, expected.numpy(), rtol=0, atol=2.0**-24)  # MLX may multiply and add in one rounding
    # A copy, and one that was stored, hold the same and are written the same.
    pared.save(small, tmp_path / "artifact")
    loaded = pared.load(tmp_path / "artifact", built("Llama", max_position_embeddings=32, num_hidden_layers=1))
    name = "model.gguf" if target == "gguf" else "model.safetensors"
    first = (tmp_path / "out" / name).read_bytes()
    for i, other in enumerate((loaded, pickle.loads(pickle.dumps(small)))):
        pared.export(other, tmp_path / f"again{i}", to=target, folder=given[0])
        assert len((tmp_path / f"again{i}" / name).read_bytes()) == len(first)
        again = READERS[target](tmp_path / f"again{i}")
        assert np.array_equal(again, found)


@pytest.mark.filterwarnings("ignore")  # of libraries
def test_a_graph_runs(given: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = fitted("onnx", given, tmp_path / "out", monkeypatch)
    ids = torch.arange(105, 137)[None]
    with torch.no_grad():
        expected = small(input_ids=ids).logits.numpy()
    found = in_onnxruntime(tmp_path / "out" / "model.onnx", {"input_ids": ids})
    assert sqnr(found[0], expected) > 26  # inputs are rounded to int8


@pytest.mark.filterwarnings("ignore")  # of libraries
def test_openvino_genai_opens_what_is_written(
    given: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = fitted("openvino", given, tmp_path / "out", monkeypatch)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given[0])
    prompt = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    greedy = {"max_new_tokens": 4, "do_sample": False}
    expected = small.generate(prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, **greedy)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    pipeline = openvino_genai.LLMPipeline(str(tmp_path / "out"), "CPU", **exact)
    found = pipeline.generate(TEXTS[0], **greedy, ignore_eos=True, apply_chat_template=False)
    assert found == tokenizer.decode(expected[0, prompt.shape[1] :], skip_special_tokens=True)
