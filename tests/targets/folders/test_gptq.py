"""Folders in GPTQ's layout, read again by plain code that shares nothing with ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from pared.errors import ConfigError
from pared.formats.groups.grid import GroupGrid, Numbers
from pared.targets.folders import gptq
from pared.targets.target import Offer, Role
from tests.targets.sources import CONFIG, Random, llama_shapes, named, random_parts

HALF = {**CONFIG, "dtype": "float16"}


def codes_of(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes of a matrix of words, down its first dimension."""
    found = np.zeros((len(words) * 32 // bits, words.shape[1]), np.int64)
    for column in range(words.shape[1]):
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words[:, column]))
        found[:, column] = [stream >> (bits * i) & (1 << bits) - 1 for i in range(len(found))]
    return found


def weight_of(tensors: dict[str, np.ndarray], module: str, bits: int, less: int) -> np.ndarray:
    """A matrix as GPTQ's readers make it: (code - zero) * scale, by the group of each column."""
    codes = codes_of(tensors[f"{module}.qweight"], bits)
    zeros = codes_of(tensors[f"{module}.qzeros"].T, bits).T + less
    group = tensors[f"{module}.g_idx"]
    scales = tensors[f"{module}.scales"].astype(np.float32)
    weight: np.ndarray = ((codes - zeros[group]) * scales[group]).T.astype(np.float32)
    return weight


def format_of(said: dict[str, Any], module: str) -> dict[str, Any] | None:
    """What a runtime would take a module for: the first rule that matches, else the main format."""
    for rule, numbers in said.get("dynamic", {}).items():
        if re.match(rule[2:], module):
            return None if rule.startswith("-:") else said | numbers
    return said


@pytest.mark.parametrize("name", [offer.name for offer in gptq.TARGET.offers if "g64" not in offer.name])
@pytest.mark.parametrize("version", [1, 2])
def test_every_format_is_read_again(name: str, version: int, tmp_path: Path) -> None:
    offer = named(gptq.V2.offers, name)
    shapes = {"layers.0.dense.weight": (32, 256)}
    random = Random(shapes, lambda name, role: offer, HALF, "float16")
    (file,) = (gptq.write if version == 1 else gptq.write_v2)(random.source, tmp_path / "out")
    tensors = load_file(file)
    found = weight_of(tensors, "layers.0.dense", offer.grid.bits, less=2 - version)
    assert np.array_equal(found, random.values["layers.0.dense.weight"])
    assert sum(tensor.nbytes for tensor in tensors.values()) == offer.nbytes(32, 256)
    said = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert said["checkpoint_format"] == ("gptq" if version == 1 else "gptq_v2")
    assert said["group_size"] == (offer.grid.group or -1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("version", [1, 2])
def test_zero_points_are_read_again(bits: int, version: int, tmp_path: Path) -> None:
    offer = named(gptq.V2.offers, f"{bits} bits g32 zero")
    random = Random({"layers.0.dense.weight": (64, 96)}, lambda name, role: offer, HALF, "float16")
    write = gptq.write if version == 1 else gptq.write_v2
    (file,) = write(random.source, tmp_path / "out")
    found = weight_of(load_file(file), "layers.0.dense", bits, less=2 - version)
    assert np.array_equal(found, random.values["layers.0.dense.weight"])


def test_a_zero_that_the_first_version_cannot_hold_is_refused(tmp_path: Path) -> None:
    def at_the_least(grid: GroupGrid, rows: int, columns: int, seed: int) -> dict[str, Numbers]:
        parts = random_parts(grid, rows, columns, seed)
        parts["zero"][0, 0] = grid.low
        return parts

    offer = named(gptq.V2.offers, "4 bits g32 zero")
    random = Random({"layers.0.dense.weight": (32, 64)}, lambda name, role: offer, HALF, "float16", at_the_least)
    with pytest.raises(ConfigError, match='layers.0.dense.weight: .*\n.*"gptq_v2"'):
        gptq.write(random.source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (file,) = gptq.write_v2(random.source, tmp_path / "out")
    assert np.array_equal(weight_of(load_file(file), "layers.0.dense", 4, 0), random.values["layers.0.dense.weight"])


def test_steps_beyond_float16_are_refused_where_the_model_computes_in_it(tmp_path: Path) -> None:
    def tiny(grid: GroupGrid, rows: int, columns: int, seed: int) -> dict[str, Numbers]:
        parts = random_parts(grid, rows, columns, seed)
        return {**parts, "step": np.full_like(parts["step"], 1.5 * 2.0**-30)}

    offer = named(gptq.TARGET.offers, "8 bits row")
    shapes = {"layers.0.dense.weight": (32, 64)}
    with pytest.raises(ConfigError, match="steps that float16 does not hold"):
        gptq.write(Random(shapes, lambda name, role: offer, HALF, "float16", tiny).source, tmp_path / "out")
    (file,) = gptq.write(Random(shapes, lambda name, role: offer, CONFIG, parts_of=tiny).source, tmp_path / "out")
    assert load_torch(file)["layers.0.dense.scales"].double().unique().tolist() == [1.5 * 2.0**-30]


def test_modules_may_differ(tmp_path: Path) -> None:
    def choose(name: str, role: Role) -> Offer | None:
        if role != "linear" or "1.mlp.down" in name:
            return None
        return named(gptq.TARGET.offers, "8 bits row" if ".1.self_attn" in name else "4 bits g64")

    random = Random(llama_shapes(), choose, HALF, "float16")
    (file,) = gptq.write(random.source, tmp_path / "out")
    tensors = load_file(file)
    said = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert said == json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    for outline in random.source.outlines:
        module = outline.name.removesuffix(".weight")
        if outline.role == "linear":
            numbers = format_of(said, module)
            assert (numbers is None) == (outline.offer is None), module
            if numbers is not None:
                found = weight_of(tensors, module, numbers["bits"], less=1)
                assert np.array_equal(found, random.values[outline.name])
        else:
            assert np.array_equal(tensors[outline.name], random.parts[outline.name]["values"])
    # vLLM asks for the modules that it makes of several
    assert format_of(said, "model.layers.1.self_attn.qkv_proj")["bits"] == 8
    assert format_of(said, "model.layers.0.self_attn.qkv_proj")["bits"] == 4
    assert format_of(said, "model.layers.11.self_attn.q_proj")["bits"] == 4
