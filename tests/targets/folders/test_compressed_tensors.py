"""Folders of compressed-tensors, as transformers opens them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pared.targets.folders import compressed_tensors
from pared.targets.folders.compressed_tensors import ANY_BITS, INT8, TARGET
from pared.targets.target import Offer, Role
from tests.targets.sources import CONFIG, Random, llama_shapes, named

EVERY = {offer.name: offer for target in (ANY_BITS, TARGET, INT8) for offer in target.offers}


def opened(folder: Path, *, dequantize: bool) -> Any:
    """The model; without `dequantize` the library decodes its weights at the first call."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how)
    model.eval()
    with torch.no_grad():
        model(torch.arange(4)[None])
    return model


def check_equal(model: Any, random: Random) -> None:
    state = model.state_dict()
    for name, values in random.values.items():
        assert torch.equal(state[name].float(), torch.from_numpy(values).bfloat16().float()), name


def linear(offer: Offer) -> Any:
    return lambda name, role: offer if role == "linear" else None


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")  # of libraries
@pytest.mark.parametrize("name", ["W8A16 row", "W4A16 g64 zero", "W4A16 g128", "W5A16 row", "W8A8 row"])
def test_transformers_reads_what_is_said(name: str, tmp_path: Path) -> None:
    random = Random(llama_shapes(), linear(EVERY[name]))
    files = compressed_tensors.write(random.source, tmp_path / "out")
    assert sum(file.stat().st_size for file in files) == compressed_tensors.nbytes(random.source)
    model = opened(tmp_path / "out", dequantize=True)
    check_equal(model, random)
    if name != INT8.offers[0].name:  # whose activations are rounded too
        check_logits(model, random)


def check_logits(model: Any, random: Random) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    plain: Any = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "dtype"}))
    plain.eval()
    plain.load_state_dict({name: torch.from_numpy(values) for name, values in random.values.items()}, strict=False)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected, found = plain(ids).logits, model(ids).logits.float()
    assert (expected - found).norm() < 0.03 * expected.norm()  # of bfloat16


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")  # of libraries
def test_formats_may_differ(tmp_path: Path) -> None:
    random = Random(llama_shapes(), mixed(EVERY["W4A16 g64"]))
    compressed_tensors.write(random.source, tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert said["format"] == "mixed-precision"
    assert said["ignore"] == ["lm_head", "model.embed_tokens", "model.layers.0.mlp.down_proj"]
    assert {group["format"] for group in said["config_groups"].values()} == {"pack-quantized", "int-quantized"}
    check_equal(opened(tmp_path / "out", dequantize=False), random)


@pytest.mark.engine
def test_the_library_reads_each_matrix_of_a_mixture(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    random = Random(llama_shapes(), mixed(EVERY["W3A16 g32 zero"]))
    (file,) = compressed_tensors.write(random.source, tmp_path / "out")
    tensors = load_file(file)
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(said)
    for outline in random.source.outlines:
        if outline.offer is not None:
            module = outline.name.removesuffix(".weight")
            (scheme,) = [
                scheme
                for scheme in config.config_groups.values()
                if any(re.match(target.removeprefix("re:"), module) for target in scheme.targets)
            ]
            held = {name.removeprefix(f"{module}."): v for name, v in tensors.items() if name.startswith(f"{module}.")}
            held["weight_scale"] = held["weight_scale"].float()
            weight = BaseCompressor.get_value_from_registry(scheme.format).decompress(held, scheme)["weight"]
            assert np.array_equal(weight.numpy(), random.values[outline.name]), module


def mixed(main: Offer) -> Any:
    def choose(name: str, role: Role) -> Offer | None:
        if role != "linear" or "layers.0.mlp.down" in name:
            return None
        if "self_attn.o" in name:
            return EVERY["W8A8 row"]
        return EVERY["W2A16 g32"] if "layers.1" in name else main

    return choose


@pytest.mark.parametrize("name", EVERY)
def test_bytes_are_exact(name: str, tmp_path: Path) -> None:
    shapes = {f"layers.{i}.dense.weight": (rows, 256) for i, rows in enumerate((3, 40))}
    random = Random(shapes, linear(EVERY[name]))
    (file,) = compressed_tensors.write(random.source, tmp_path / "out")
    tensors = sum(EVERY[name].nbytes(*shape) for shape in shapes.values())
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size == header + tensors


@pytest.mark.engine
@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_are_those_of_the_library(bits: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    from pared.targets.folders.bits import packed

    codes = np.random.default_rng(bits).integers(-(1 << bits - 1), 1 << bits - 1, (5, 100)).astype(np.int8)
    assert np.array_equal(packed(codes, bits), pack_to_int32(torch.from_numpy(codes), bits).numpy())
    assert np.array_equal(packed(codes.T, bits).T, pack_to_int32(torch.from_numpy(codes), bits, packed_dim=0).numpy())


def test_the_default_has_no_formats_that_few_runtimes_know() -> None:
    assert {(offer.grid.bits, offer.grid.zero) for offer in TARGET.offers} == {(4, "fixed"), (8, "fixed")}
    assert [offer.grid.bits for offer in ANY_BITS.offers] == sorted(
        (o.grid.bits for o in ANY_BITS.offers), reverse=True
    )
    assert named(ANY_BITS.offers, "W4A16 g128").nbytes(4096, 4096) * 8 == 4096 * 4096 * 4.125 + 16 * 8
