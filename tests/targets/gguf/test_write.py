"""Whole models of every family, read back by the library and by transformers."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pared.errors import ConfigError
from pared.formats.groups.grid import Numbers
from pared.targets.families.table import FAMILIES, family_of
from pared.targets.gguf.target import TARGET
from pared.targets.gguf.write import check, write
from pared.targets.pieces import Source
from pared.targets.target import Offer
from tests.targets.families.models import built
from tests.targets.gguf.folders import folder_with
from tests.targets.gguf.sources import source_of

pytestmark = pytest.mark.slow

# Each kind that the width takes, in turn, and some matrices in float.
_TURNS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "F16", "BF16", None, "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")


def in_turn(name: str, offers: tuple[Offer, ...]) -> Offer | None:
    possible = [wanted for wanted in _TURNS if wanted is None or any(offer.name == wanted for offer in offers)]
    wanted = possible[zlib.crc32(name.encode()) % len(possible)]
    return next((offer for offer in offers if offer.name == wanted), None)


def file_of(source: Source, path: Path) -> gguf.GGUFReader:
    (file,) = write(source, path)
    return gguf.GGUFReader(file)


def read(reader: gguf.GGUFReader) -> dict[str, Numbers]:
    return {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in reader.tensors}


def value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_tensor_reads_back_as_what_its_grid_says(family: Any, tmp_path: Path) -> None:
    model = built(family.name)
    source = source_of(model, TARGET, in_turn)
    held = read(file_of(source, tmp_path))
    heads = {"q_proj": 4, "k_proj": 2}
    seen = set()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.gguf], 2)
    for name, parameter in model.named_parameters():
        if not family.uses(name):
            continue
        expected = parameter.detach().numpy()
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        found, part = held[place], name.split(".")[-2]
        seen.add(place)
        if family.gguf == "LLAMA" and part in heads:  # as transformers puts them back
            pairs = found.reshape(heads[part], found.shape[0] // heads[part] // 2, 2, -1)
            found = pairs.swapaxes(1, 2).reshape(found.shape)
        if part in family.transposed:
            expected = expected.T
        offset = 1 if family.name.startswith("Gemma") and expected.ndim == 1 else 0
        kinds: list[Any] = [np.float32, np.float16, "bfloat16"]
        near = [np.array_equal(found, np.asarray(expected + offset).astype(kind).astype(np.float32)) for kind in kinds]
        assert any(near), name
    assert seen == set(held)
    assert not list(tmp_path.glob(".pared*"))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "Phi-3", "GPT-2"])
def test_transformers_reads_the_same_model(family: str, tmp_path: Path) -> None:
    model = built(family)
    kind = "gpt2" if family == "GPT-2" else "qwen2" if "Qwen" in family else "llama"
    folder_with(tmp_path / "source", kind, model.config.to_dict())
    source = source_of(model, TARGET, lambda _, offers: offers[4], tmp_path / "source")
    write(source, tmp_path / "model.gguf")
    auto: Any = transformers.AutoModelForCausalLM
    found = auto.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected = dict(model.named_parameters())
    for name, parameter in found.named_parameters():
        error = (parameter - expected[name]).abs().max()
        assert error <= (2e-7 if "norm" in name and family.startswith("Gemma") else 0), name  # 1 was added to these


def test_blocks_of_256_columns(tmp_path: Path) -> None:
    model = built("Llama", hidden_size=256, intermediate_size=512)
    names = itertools.cycle(("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"))

    def next_one(_: str, offers: tuple[Offer, ...]) -> Offer:
        wanted = next(names)
        return next(offer for offer in offers if offer.name == wanted)

    source = source_of(model, TARGET, next_one)
    reader = file_of(source, tmp_path / "k.gguf")
    types = {one.tensor_type.name for one in reader.tensors}
    assert types > {"Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"}
    held = read(reader)
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            place = name.replace("model.layers", "blk").replace("self_attn.o_proj", "attn_output")
            found = held[place.replace("mlp.down_proj", "ffn_down")]
            assert np.array_equal(found, parameter.detach().numpy())


def test_bytes_are_those_that_were_promised(tmp_path: Path) -> None:
    source = source_of(built("Llama"), TARGET, in_turn)
    reader = file_of(source, tmp_path)
    held = {one.name: one.n_bytes for one in reader.tensors}
    for outline in source.outlines:
        if outline.offer is not None and "down_proj" in outline.name:
            place = outline.name.replace("model.layers", "blk").replace("mlp.down_proj", "ffn_down")
            assert outline.offer.nbytes(64, 96) - held[place] in range(32)


def test_metadata(tmp_path: Path) -> None:
    model = built("Llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    reader = file_of(source_of(model, TARGET, lambda _, offers: offers[-1]), tmp_path)
    assert value(reader, "general.architecture") == "llama"
    assert value(reader, "general.file_type") == gguf.LlamaFileType.MOSTLY_Q4_0
    assert value(reader, "llama.block_count") == 2
    assert value(reader, "llama.attention.head_count_kv") == 2
    assert value(reader, "llama.rope.freq_base") == 5e5
    assert value(reader, "quantize.pared.tool") == "a test"
    assert value(reader, "tokenizer.ggml.model") == "none"
    assert "output.weight" not in {one.name for one in reader.tensors}  # the head is the table


def test_scaled_rotary_positions(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
    model = built("Llama", head_dim=32, rope_parameters={**rope, "low_freq_factor": 1.0, "high_freq_factor": 4.0})
    held = read(file_of(source_of(model, TARGET), tmp_path))
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 1e4 ** (-np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(plain / held["rope_freqs.weight"], wanted.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("Llama", {"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not known\n  Known are"),
        ("Llama", {"hidden_act": "gelu"}, "activation is 'gelu', and llama.cpp runs silu\n  It"),
        ("Llama", {"max_position_embeddings": None}, "has no max_position_embeddings\n  Pass the folder"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic"}}, "kind 'dynamic' cannot be written"),
        ("Llama", {"num_attention_heads": "four"}, "makes no sense .ValueError: .*'four'.*\n  Compare it"),
        ("Llama", {"rope_parameters": {"rope_type": "llama3"}}, "lacks a setting, .* .KeyError: 'factor'"),
        ("GPT-2", {"n_layer": None}, "lacks a setting|has no num_hidden_layers"),
        ("Gemma 2", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar is 7, and llama.cpp computes with 32"),
    ],
)
def test_what_llama_cpp_does_not_run_is_refused(
    family: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = source_of(built(family), TARGET)
    source = Source(source.outlines, source.read, {**source.config, **change})
    with pytest.raises(ConfigError, match=message):
        write(source, tmp_path)
    with pytest.raises(ConfigError, match=message):
        check(source.config, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is a tokenizer of the kind None"),
        ('{"model": null}', "lacks a setting, or has one that makes no sense"),
        ('{"model": {"type": "BPE", "vocab": [1, 2], "merges": 5}}', "lacks a setting, or has one that makes no sense"),
    ],
)
def test_a_damaged_tokenizer_is_refused_before_any_work(content: str, message: str, tmp_path: Path) -> None:
    folder_with(tmp_path, "smollm")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        check(built("Llama").config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "model.layers.0.adapter.weight"}, "model.layers.0.adapter.weight: has no place in a GGUF file of"),
        ({"shape": (64, 48)}, r"has 48 columns, and Q8_0 needs a multiple of 32\n  Give it another format"),
        ({"offer": Offer("W4A16 g128", "float16", lambda rows, _: rows)}, "has the format W4A16 g128, which is none"),
        ({"offer": None, "dtype": "float64"}, "holds float64, for which"),
        ({"name": "model.layers.0.self_attn.q_proj.weight"}, "has the same place in a GGUF file as model.layers.0"),
    ],
)
def test_tensors_that_have_no_place_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = source_of(built("Llama"), TARGET, lambda _, offers: offers[3])
    at = next(i for i, one in enumerate(source.outlines) if "layers.0.self_attn.o_proj" in one.name)
    outlines = list(source.outlines)
    outlines[at] = replace(outlines[at], **({"names": ()} | changes))
    with pytest.raises(ConfigError, match=message):
        write(Source(outlines, source.read, source.config), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    source = source_of(built("Llama"), TARGET)

    def fails(outline: Any) -> Any:
        if "layers.1" in outline.name:
            raise RuntimeError("the disk is full")
        return source.read(outline)

    with pytest.raises(RuntimeError, match="full"):
        write(Source(source.outlines, fails, source.config), tmp_path)
    assert not list(tmp_path.iterdir())


def test_families_of_the_test_are_all() -> None:
    assert all(family_of(built(family.name).config.to_dict()) is family for family in FAMILIES)
