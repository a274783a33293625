"""Checkpoints written for runtimes, without the model's code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import pared
from pared.checkpoints import compress
from pared.checkpoints.runtimes import writing
from pared.checkpoints.runtimes.choosing import rounded
from pared.errors import ConfigError, FileError, ModelError
from tests.targets.sources import CONFIG, llama_shapes

SHAPES = llama_shapes()
COUNT = sum(int(np.prod(shape)) for shape in SHAPES.values())
FOLDERS = ("compressed-tensors", "compressed-tensors-any", "compressed-tensors-int8", "gptq", "gptq_v2", "mlx")


def checkpoint(
    folder: Path, config: Mapping[str, Any] = CONFIG, tensors: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """A Llama of random weights, of which those in later layers are larger."""
    random = np.random.default_rng(0)
    made = tensors or {
        name: (random.standard_t(5, shape) * 0.02 * (i + 1)).astype(ml_dtypes.bfloat16)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    folder.mkdir()
    save_file(dict(made), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return dict(made)


def weights_nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model*"))


@pytest.mark.parametrize("target", FOLDERS)
def test_a_folder_is_written_within_its_bits(target: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "given")
    bits = 10.5 if target == "compressed-tensors-int8" else 7.0
    path = pared.compress(tmp_path / "given", tmp_path / "out", target=target, bits=bits)
    assert path == tmp_path / "out"
    (file,) = path.glob("*.safetensors")
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    average = 8 * (file.stat().st_size - header) / COUNT
    assert bits - 1.5 < average <= bits
    assert (path / "tokenizer.json").read_text() == "{}"
    said = json.loads((path / "config.json").read_text())
    assert said["quantization_config"]
    assert said["hidden_size"] == CONFIG["hidden_size"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["given", "out"]


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "mlx"])
@pytest.mark.parametrize("share", [0.45, 0.6])
def test_a_folder_is_written_within_its_size(target: str, share: float, tmp_path: Path) -> None:
    checkpoint(tmp_path / "given")
    most = int(share * weights_nbytes(tmp_path / "given"))
    done = compress.run(tmp_path / "given", tmp_path / "out", target=target, max_size=most, quiet=True)
    assert 0.8 * most < weights_nbytes(tmp_path / "out") <= most
    assert done.nbytes == weights_nbytes(tmp_path / "out")
    assert done.copied == ("tokenizer.json",)
    assert "bits per weight on average" in str(done)


def test_errors_are_those_of_the_formats(tmp_path: Path) -> None:
    given = checkpoint(tmp_path / "given")
    pared.compress(tmp_path / "given", tmp_path / "out", target="compressed-tensors-int8", bits=12)
    held = load_file(tmp_path / "out/model.safetensors")
    for name, exact in given.items():
        values = held[name].astype(np.float32)
        if f"{name}_scale" in held:
            values *= held[f"{name}_scale"].astype(np.float32)
            error = np.square(values - exact.astype(np.float32)).sum() / np.square(exact.astype(np.float32)).sum()
            assert error < 1e-3, name
        else:
            assert held[name].tobytes() == exact.tobytes(), name


def test_more_bytes_do_less_damage(tmp_path: Path) -> None:
    checkpoint(tmp_path / "given")
    sizes = []
    for bits in (6.5, 7.0, 8.5):
        pared.compress(tmp_path / "given", tmp_path / str(bits), target="compressed-tensors-any", bits=bits)
        said = json.loads((tmp_path / str(bits) / "config.json").read_text())["quantization_config"]
        sizes.append(max(group["weights"]["num_bits"] for group in said["config_groups"].values()))
    assert sizes == sorted(sizes)


def test_what_is_joined_is_alike(tmp_path: Path) -> None:
    checkpoint(tmp_path / "given")
    pared.compress(tmp_path / "given", tmp_path / "out", target="compressed-tensors-any", bits=7.1)
    with safe_open(tmp_path / "out/model.safetensors", "numpy") as file:
        packed = {name: file.get_slice(name).get_shape() for name in file.keys() if "packed" in name}  # noqa: SIM118
    for i in range(2):
        for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({packed[f"model.layers.{i}.{part}.weight_packed"][1] for part in parts}) == 1


def test_copies_of_a_table_are_tied(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "first", {**CONFIG, "tie_word_embeddings": True})
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    checkpoint(tmp_path / "given", {**CONFIG, "tie_word_embeddings": True}, tensors)
    pared.compress(tmp_path / "given", tmp_path / "out", target="mlx", bits=5)
    with safe_open(tmp_path / "out/model.safetensors", "numpy") as file:
        names = list(file.keys())
    assert "model.embed_tokens.scales" in names
    assert not any(name.startswith("lm_head") for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tpu", "bits": 4}, "target='tpu' is not one of 'pared', 'gguf'"),
        ({"target": "onnx", "bits": 4}, "onnx needs the graph of the model"),
        ({"target": "mlx"}, "give either bits or max_size"),
        ({"target": "mlx", "bits": 4, "max_size": 1000}, "give either bits or max_size"),
        ({"target": "mlx", "bits": -1}, "is not a valid rate"),
        ({"target": "mlx", "bits": 1}, "bits: mlx needs at least .* bits each on average"),
        ({"target": "compressed-tensors", "bits": 4}, "keeps in float, such as embeddings"),
        ({"target": "mlx", "max_size": "10KB"}, "max_size: mlx needs at least"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "given")
    with pytest.raises(ConfigError, match=message):
        pared.compress(tmp_path / "given", tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


@pytest.mark.parametrize("target", ["mlx", "compressed-tensors-any"])
def test_the_least_that_an_error_names_is_enough(target: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "given")
    with pytest.raises(ConfigError) as caught:
        pared.compress(tmp_path / "given", tmp_path / "out", target=target, bits=1)
    (bits,) = re.findall(r"([0-9.]+) bits each", str(caught.value))
    pared.compress(tmp_path / "given", tmp_path / "out", target=target, bits=float(bits))


def test_sources_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "given")
    quantized = {"quant_method": "gptq", "bits": 4}
    for name, config in (
        ("conv", {**CONFIG, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}),
        ("again", {**CONFIG, "quantization_config": quantized}),
    ):
        checkpoint(tmp_path / name, config)
    with pytest.raises(ConfigError, match="transposed"):
        pared.compress(tmp_path / "conv", tmp_path / "out", target="gptq", bits=7)
    with pytest.raises(ConfigError, match="may be rounded again"):
        pared.compress(tmp_path / "again", tmp_path / "out", target="gptq", bits=7)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        pared.compress(tmp_path / "given/model.safetensors", tmp_path / "out", target="gptq", bits=7)
    with pytest.raises(FileError, match="is there already"):
        pared.compress(tmp_path / "given", tmp_path / "conv", target="gptq", bits=7)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", "{"])
def test_damaged_configurations_are_refused(content: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "given")
    (tmp_path / "given/config.json").write_text(content)
    with pytest.raises(FileError, match=r"config\.json: is not"):
        pared.compress(tmp_path / "given", tmp_path / "out", target="gptq", bits=7)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_damaged_weight_leaves_nothing(name: str, tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path / "first")
    tensors[name].reshape(-1)[3] = np.nan
    checkpoint(tmp_path / "given", tensors=tensors)
    with pytest.raises(ModelError, match=f"{name}: holds NaN"):
        pared.compress(tmp_path / "given", tmp_path / "out", target="mlx", bits=6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "given"]


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "given")
    calls = []

    def stop(*given: Any) -> Any:
        calls.append(given)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return rounded(*given)

    monkeypatch.setattr(writing, "rounded", stop)
    with pytest.raises(KeyboardInterrupt):
        pared.compress(tmp_path / "given", tmp_path / "out", target="mlx", bits=6)
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_a_runtime_whose_sizes_show_only_when_written_gets_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "given")
    monkeypatch.setattr(writing, "size_of", lambda target: None)
    most = weights_nbytes(tmp_path / "given") // 2
    pared.compress(tmp_path / "given", tmp_path / "out", target="mlx", max_size=most)
    assert 0.8 * most < weights_nbytes(tmp_path / "out") <= most


@pytest.mark.parametrize("target", FOLDERS)
def test_small_weights_of_float16_get_steps_that_it_holds(target: str, tmp_path: Path) -> None:
    """A runtime computes in the model's type, and casts steps to it."""
    small = {name: np.float16(1e-5 * np.random.default_rng(0).standard_normal(shape)) for name, shape in SHAPES.items()}
    checkpoint(tmp_path / "given", {**CONFIG, "dtype": "float16"}, small)
    pared.compress(tmp_path / "given", tmp_path / "out", target=target, bits=11)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    steps = [part.astype(np.float32) for name, part in load_file(file).items() if name.endswith(("scale", "scales"))]
    assert steps
    for step in steps:
        assert (step != 0).all()
        assert np.array_equal(step.astype(np.float16).astype(np.float32), step)


def test_stacks_of_experts_are_named_before_any_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = checkpoint(tmp_path / "first")
    stack = np.ones((4, 64, 32), ml_dtypes.bfloat16)
    checkpoint(tmp_path / "given", tensors={**tensors, "model.layers.0.mlp.experts.gate_up_proj": stack})
    done = compress.run(tmp_path / "given", tmp_path / "out", target="mlx", bits=7, quiet=True)
    assert "mlx has no format for stacks of matrices: model.layers.0.mlp.experts.gate_up_proj and 0 more" in caplog.text
    assert "in float stay" in str(done)
    assert "model.layers.0.mlp.experts.gate_up_proj" in str(done)
    held = load_file(tmp_path / "out/model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"]
    assert held.tobytes() == stack.tobytes()
