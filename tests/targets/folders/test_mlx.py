"""Folders in MLX's layout, read by MLX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pared.errors import ConfigError
from pared.formats.groups.grid import GroupGrid, Numbers
from pared.targets.folders import mlx
from pared.targets.target import Offer, Role
from tests.targets.sources import CONFIG, Random, llama_shapes, named, random_parts


def decoded(folder: Path, module: str, said: dict[str, Any]) -> np.ndarray:
    """A matrix as MLX makes it of its words, scales and biases in float32."""
    mx = pytest.importorskip("mlx.core")
    tensors = mx.load(str(folder / "model.safetensors"))
    pair = [tensors[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases")]
    return np.array(mx.dequantize(tensors[f"{module}.weight"], *pair, group_size=said["group_size"], bits=said["bits"]))


@pytest.mark.engine
@pytest.mark.parametrize("name", [offer.name for offer in mlx.TARGET.offers])
def test_mlx_reads_what_is_said(name: str, tmp_path: Path) -> None:
    offer = named(mlx.TARGET.offers, name)
    random = Random({"layers.0.dense.weight": (24, 384)}, lambda name, role: offer)
    (file,) = mlx.write(random.source, tmp_path / "out")
    assert file.stat().st_size == mlx.nbytes(random.source)
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    found = decoded(tmp_path / "out", "layers.0.dense", said)
    # MLX may multiply and add in one rounding, where the definition has two.
    assert np.allclose(found, random.values["layers.0.dense.weight"], rtol=0, atol=2.0**-24)


@pytest.mark.engine
def test_modules_may_differ(tmp_path: Path) -> None:
    def choose(name: str, role: Role) -> Offer | None:
        if role == "other" or "1.mlp.down" in name:
            return None
        return named(mlx.TARGET.offers, "6 bits g64" if role in ("table", "head") else "3 bits g32")

    random = Random(llama_shapes(), choose)
    mlx.write(random.source, tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["quantization"] == said["quantization_config"]
    assert (said["quantization"]["bits"], said["quantization"]["group_size"]) == (3, 32)
    for outline in random.source.outlines:
        if outline.offer is not None:
            module = outline.name.removesuffix(".weight")
            numbers = said["quantization"].get(module, said["quantization"])
            found = decoded(tmp_path / "out", module, numbers)
            assert np.allclose(found, random.values[outline.name], rtol=0, atol=2.0**-24)


def test_experts_are_named_as_they_will_be_stacked(tmp_path: Path) -> None:
    shapes = {"layers.0.mlp.experts.0.up_proj.weight": (32, 64), "layers.0.self_attn.o_proj.weight": (32, 64)}
    shapes |= {f"layers.{i}.self_attn.q_proj.weight": (32, 64) for i in range(3)}
    random = Random(shapes, lambda name, role: named(mlx.TARGET.offers, f"{2 if 'experts' in name else 4} bits g64"))
    mlx.write(random.source, tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert said["layers.0.mlp.switch_mlp.up_proj"] == {"group_size": 64, "bits": 2}


def test_steps_beyond_float16_are_refused_where_the_model_computes_in_it(tmp_path: Path) -> None:
    def tiny(grid: GroupGrid, rows: int, columns: int, seed: int) -> dict[str, Numbers]:
        parts = random_parts(grid, rows, columns, seed)
        return {**parts, "step": np.full_like(parts["step"], 1.5 * 2.0**-30)}

    random = Random(
        {"layers.0.dense.weight": (32, 64)},
        lambda name, role: named(mlx.TARGET.offers, "8 bits g64"),
        {**CONFIG, "dtype": "float16"},
        "float16",
        tiny,
    )
    with pytest.raises(ConfigError, match="layers.0.dense.weight: .*float16"):
        mlx.write(random.source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["t5", "falcon", "bloom", "bert", "../llama", "", None])
def test_models_that_mlx_lm_does_not_load_are_refused(kind: str | None, tmp_path: Path) -> None:
    random = Random({"layers.0.dense.weight": (32, 64)}, lambda name, role: None, {**CONFIG, "model_type": kind})
    with pytest.raises(ConfigError, match=r"config\.json: .*mlx-lm.*\n  Use the target \"onnx\" or \"openvino\""):
        mlx.write(random.source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [{"model_type": "mistral"}, {"model_type": "lfm2-vl"}, {"model_file": "own.py"}])
def test_models_that_mlx_lm_loads(config: dict[str, Any]) -> None:
    mlx.check(config)


def test_the_installed_mlx_lm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "mlx_lm" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").write_text("raise AssertionError('it was imported')")
    (models / "brand_new.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    mlx.check({"model_type": "brand_new"})
    with pytest.raises(ConfigError, match="mlx-lm has no loader for models of type newer"):
        mlx.check({"model_type": "newer"})
