"""A folder that was compressed and expanded opens where its source opened, under the source's names."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel
from typer.testing import CliRunner

import pared
from pared.artifact.envelope import open_records
from pared.artifact.index import Index
from pared.artifact.parse import parse_index
from pared.artifact.torch_file import write_torch
from pared.checkpoints import compress
from pared.checkpoints.folders.layout import layout_of
from pared.cli import app
from pared.errors import ConfigError, FileError


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


STATE = {f"layers.{i}.weight": drawn(8 + i, 32) for i in range(4)} | {"norm.bias": drawn(32)}


def write(path: Path, state: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(dict(state), path)
    else:
        torch.save(dict(state), path)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def there_and_back(source: Path, where: Path) -> Path:
    pared.compress(source, where / "small")
    return pared.expand(where / "small", where / "big")


CASES = {
    "shards": (
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
    ),
    "shards of torch": (
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
    ),
    "a variant": (
        ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
        [
            "model.fp16-00001-of-00002.safetensors",
            "model.fp16-00002-of-00002.safetensors",
            "model.safetensors.index.fp16.json",
        ],
    ),
    "one file of torch": (["pytorch_model.bin"], ["model.safetensors"]),
    "an adapter": (["adapter_model.bin"], ["adapter_model.safetensors"]),
    "a name of the user": (["weights of 2.5.pt"], ["weights of 2.5.safetensors"]),
    "nested deep": (["a/b/c/model.safetensors"], ["a/b/c/model.safetensors"]),
    "of Intel Neural Compressor": (["best_model.pt"], ["model.safetensors"]),
    "a dot in the name": (
        ["Qwen2.5-1B-00001-of-00002.safetensors", "Qwen2.5-1B-00002-of-00002.safetensors"],
        [
            "Qwen2.5-1B-00001-of-00002.safetensors",
            "Qwen2.5-1B-00002-of-00002.safetensors",
            "Qwen2.5-1B.safetensors.index.json",
        ],
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_weights_are_under_the_names_of_the_source(tmp_path: Path, kind: str) -> None:
    before, after = CASES[kind]
    names = list(STATE)
    for i, name in enumerate(before):
        mine = names if len(before) == 1 else names[:2] if i == 0 else names[2:]
        write(tmp_path / "m" / name, {key: STATE[key] for key in mine})
    found = there_and_back(tmp_path / "m", tmp_path)
    assert files(tmp_path / "big") == sorted(after)
    assert found == tmp_path / "big" / next((name for name in after if name.endswith(".json")), after[0])
    state: dict[str, Tensor] = {}
    for name in after:
        if name.endswith(".safetensors"):
            state |= safetensors.torch.load_file(tmp_path / "big" / name)
    assert set(state) == set(STATE)
    assert all(torch.allclose(state[name], STATE[name], atol=0.05) for name in STATE)
    with_index = [name for name in after if name.endswith(".json")]
    for name in with_index:
        index = json.loads((tmp_path / "big" / name).read_text())
        assert index["weight_map"] == {key: after[0] if key in names[:2] else after[1] for key in sorted(STATE)}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in STATE.values())
    assert pared.inspect(tmp_path / "big").elements == sum(tensor.numel() for tensor in STATE.values())


def test_an_ordinary_folder_says_nothing_about_its_files(tmp_path: Path) -> None:
    write(tmp_path / "m" / "model.safetensors", STATE)
    done = compress.run(tmp_path / "m", tmp_path / "small", quiet=True)
    with open_records(done.path) as records:
        assert set(parse_index(records).provenance) == {"pared", "compress"}


@pytest.mark.parametrize(
    "recorded",
    [
        *([["../m.safetensors", 5]], [["/tmp/m.safetensors", 5]], [["a/../../m.safetensors", 5]], [["m\0", 5]]),
        *(
            [["m.safetensors", 4]],
            [["m.safetensors", -1], ["n.safetensors", 6]],
            [["m.safetensors", 5.0]],
            [["m", True]],
        ),
        *([["a.pt", 3], ["a.bin", 2]], {"m": 5}, [], "m", [5], [[5, 5]], [["x" * 300, 5]], [[".hidden", 5]]),
        *([["C:x", 5]], [["best_model.pt/m", 5]], [["best_model.safetensors", 5]], [["", 5]]),
    ],
)
def test_names_that_a_stranger_wrote_lead_nowhere(
    tmp_path: Path, recorded: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "m" / "model.safetensors", STATE)
    path = pared.compress(tmp_path / "m", tmp_path / "small")
    with open_records(path) as records:
        index, data = parse_index(records), bytes(records.data)
    changed = Index(index.entries, {}, {"files": recorded}).to_bytes()
    path.unlink()
    with path.open("wb") as file:
        write_torch(file, changed, iter([data]), len(data))
    found = pared.expand(path.parent, tmp_path / "big")
    inside = [found, *(tmp_path / "big").rglob("*.safetensors")]
    assert all(one.resolve().is_relative_to(tmp_path / "big") for one in inside)
    if recorded != [["best_model.pt/m", 5]]:
        assert files(tmp_path / "big") == ["model.safetensors"]
        assert "is not sound" in caplog.text
    assert caplog.records == [] or all(one.levelno == logging.WARNING for one in caplog.records)


def test_more_files_than_any_model_has() -> None:
    many = [[f"{i}.safetensors", 0] for i in range(10_001)]
    assert list(layout_of({"files": many}, 0, "here").files) == ["model.safetensors"]


@pytest.mark.model
def test_a_sharded_model_of_transformers_opens_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=300
    )
    model: Any = BertModel(config)
    model.requires_grad_(False).eval()
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    found = there_and_back(tmp_path / "hf", tmp_path)
    assert files(tmp_path / "big") == files(tmp_path / "hf")
    assert found.name == "model.safetensors.index.json"
    again: Any = AutoModel.from_pretrained(tmp_path / "big").eval()
    x = torch.arange(12)[None]
    assert torch.allclose(model(x).last_hidden_state, again(x).last_hidden_state, atol=0.1)


# --- several models in one folder


def pipeline(folder: Path) -> dict[str, dict[str, Tensor]]:
    """A pipeline of diffusers: three models, a scheduler and a tokenizer; and the whole again in another layout."""
    states = {
        "unet": {"conv.weight": drawn(8, 4, 3, 3), "down.weight": drawn(16, 8)},
        "vae": {"decoder.weight": drawn(12, 16)},
        "text_encoder": {"embed.weight": drawn(20, 16)},
    }
    write(folder / "unet" / "diffusion_pytorch_model.safetensors", states["unet"])
    write(folder / "unet" / "diffusion_pytorch_model.bin", states["unet"])
    write(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors", states["vae"])
    names = list(states["text_encoder"])
    for i in (1, 2):
        part = {name: states["text_encoder"][name] for name in names} if i == 1 else {"more": drawn(2, 16)}
        write(folder / "text_encoder" / f"model-0000{i}-of-00002.safetensors", part)
    states["text_encoder"]["more"] = drawn(2, 16)
    for name in ("unet", "vae", "text_encoder"):
        (folder / name / "config.json").write_text("{}")
    for name in ("scheduler/scheduler_config.json", "tokenizer/vocab.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    manifest = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(manifest))
    write(folder / "v1-5-pruned.safetensors", {"model.diffusion_model.conv.weight": drawn(8, 4, 3, 3)})
    return states


def test_a_pipeline_is_compressed_model_by_model(tmp_path: Path) -> None:
    states = pipeline(tmp_path / "m")
    done = compress.run(tmp_path / "m", tmp_path / "small", quiet=True)
    assert done.path == tmp_path / "small"
    assert set(done.not_copied) == {"unet/diffusion_pytorch_model.bin", "v1-5-pruned.safetensors"}
    parts = ["text_encoder", "unet", "vae"]
    assert [name for name in files(tmp_path / "small") if name.endswith(".pt")] == [
        f"{part}/best_model.pt" for part in parts
    ]
    assert pared.expand(tmp_path / "small", tmp_path / "big") == tmp_path / "big"
    assert files(tmp_path / "big") == sorted(
        {*files(tmp_path / "m"), "text_encoder/model.safetensors.index.json"}
        - {"unet/diffusion_pytorch_model.bin", "v1-5-pruned.safetensors"}
    )
    for part, file in {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model.fp16"}.items():
        found = safetensors.torch.load_file(tmp_path / "big" / part / f"{file}.safetensors")
        assert {name: tensor.shape for name, tensor in found.items()} == {
            name: tensor.shape for name, tensor in states[part].items()
        }
    ledger = pared.inspect(tmp_path / "small")
    assert {row.name.partition("/")[0] for row in ledger.rows if row.shape} == set(parts)
    compared = str(pared.compare(tmp_path / "m", tmp_path / "small"))
    assert "5 in both" in compared
    shown = CliRunner().invoke(app, ["compress", str(tmp_path / "m"), "-o", str(tmp_path / "again")])
    assert shown.exit_code == 0
    assert "a copy of the model, in diffusion_pytorch_model.bin" in shown.output


def test_a_pipeline_that_lost_a_part_is_refused(tmp_path: Path) -> None:
    pipeline(tmp_path / "m")
    (tmp_path / "m" / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(FileError, match="vae: has the configuration of a model, and no weights"):
        pared.compress(tmp_path / "m", tmp_path / "out")
    (tmp_path / "m" / "vae" / "config.json").unlink()
    (tmp_path / "m" / "vae").rmdir()
    with pytest.raises(FileError, match="vae: is a part of the model, and missing"):
        pared.compress(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_outside_of_the_folder_is_no_part(tmp_path: Path) -> None:
    pipeline(tmp_path / "m")
    pipeline(tmp_path / "other")
    (tmp_path / "m" / "unet").rename(tmp_path / "elsewhere")
    (tmp_path / "m" / "unet").symlink_to(tmp_path / "elsewhere")
    for manifest in ({"../other": ["a", "b"]}, {"/tmp": ["a", "b"]}, {"unet": ["a", "b"]}):
        (tmp_path / "m" / "model_index.json").write_text(json.dumps(manifest))
        done = compress.run(tmp_path / "m", tmp_path / "out", quiet=True)
        assert done.path == tmp_path / "out" / "best_model.pt"  # of the file in the top folder alone


def test_a_size_is_for_one_model(tmp_path: Path) -> None:
    pipeline(tmp_path / "m")
    with pytest.raises(ConfigError, match="max_size cannot be divided among the 3 models"):
        pared.compress(tmp_path / "m", tmp_path / "out", max_size="1MB")
    pared.compress(tmp_path / "m", tmp_path / "out")
    with pytest.raises(ConfigError, match="holds 3 models, which are not written into one file"):
        pared.expand(tmp_path / "out", tmp_path / "one.safetensors")


def test_damage_in_one_part_is_found_before_anything_is_written(tmp_path: Path) -> None:
    pipeline(tmp_path / "m")
    with (tmp_path / "m" / "vae" / "diffusion_pytorch_model.fp16.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(FileError, match="the rest does not belong to any tensor"):
        pared.compress(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sentence_transformers_keep_the_layers_after_the_model(tmp_path: Path) -> None:
    write(tmp_path / "m" / "model.safetensors", STATE)
    (tmp_path / "m" / "config.json").write_text("{}")
    write(tmp_path / "m" / "2_Dense" / "pytorch_model.bin", {"linear.weight": drawn(16, 32)})
    for name in ("1_Pooling", "2_Dense"):
        (tmp_path / "m" / name).mkdir(exist_ok=True)
        (tmp_path / "m" / name / "config.json").write_text("{}")
    modules = [{"idx": i, "name": str(i), "path": path, "type": "x"} for i, path in enumerate(("", "2_Dense"))]
    (tmp_path / "m" / "modules.json").write_text(json.dumps(modules))
    there_and_back(tmp_path / "m", tmp_path)
    assert files(tmp_path / "small") == [
        *("1_Pooling/config.json", "2_Dense/best_model.pt", "2_Dense/config.json", "best_model.pt"),
        *("config.json", "modules.json"),
    ]
    assert files(tmp_path / "big") == [
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "config.json"),
        *("model.safetensors", "modules.json"),
    ]
    assert set(safetensors.torch.load_file(tmp_path / "big" / "model.safetensors")) == set(STATE)


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": 3}', '[{"path": 3}]', '{"unet": ["a"]}', "3"])
def test_manifests_that_name_nothing(tmp_path: Path, text: str) -> None:
    write(tmp_path / "m" / "model.safetensors", STATE)
    for name in ("model_index.json", "modules.json"):
        (tmp_path / "m" / name).write_text(text)
    assert pared.compress(tmp_path / "m", tmp_path / "small").name == "best_model.pt"
