"""Models and texts of Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pared
from pared.cli import app
from pared.errors import CalibrationError, ConfigError, FileError, ModelError
from pared.fitting.hugging_face.loading import architecture_in, model_in, numbers_in, skeleton_in
from pared.fitting.hugging_face.texts import windows_of
from tests.targets.families.models import built
from tests.targets.gguf.folders import TEXTS, folder_with

pytestmark = pytest.mark.slow

BATCHES = [{"input_ids": torch.arange(12)[None]}]


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "BERT"])
def test_a_folder_is_loaded_by_its_architecture(family: str, tmp_path: Path) -> None:
    model: Any = built(family)
    model.save_pretrained(tmp_path)
    found = model_in(tmp_path)
    assert type(found) is type(model)
    assert not found.training
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_a_checkpoint_in_half_precision_computes_in_float32(tmp_path: Path) -> None:
    model: Any = built("Llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model_in(tmp_path).parameters()} == {torch.float32}


def test_a_model_whose_tables_are_made_only_as_a_whole(tmp_path: Path) -> None:
    """Gemma 3n: transformers initializes its tables with a setting that only a part of it has."""
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 96, "vocab_size_per_layer_input": 96}
    sizes |= {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0, "altup_num_inputs": 2}
    kinds = {"layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 2}
    model = transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**sizes, **kinds)).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is not computed by transformers apart from the model"):
        skeleton_in(tmp_path)
    assert numbers_in(tmp_path) == sum(parameter.numel() for parameter in model.parameters())
    options = [
        "--calib",
        f"{__name__}:BATCHES",
        "--bits",
        "8",
        "--approach",
        "weight_only",
        "-o",
        str(tmp_path / "out"),
        "-q",
    ]
    done = CliRunner().invoke(app, ["fit", str(tmp_path), *options])
    assert done.exit_code == 0, done.output
    found = pared.evaluate(tmp_path / "out", torch.arange(40), tmp_path, quiet=True)
    small: Any = pared.load(tmp_path / "out", architecture_in(tmp_path), quiet=True)
    assert found.kl < 0.05
    with torch.no_grad():
        exact = model(**BATCHES[0]).logits
        assert float((small(**BATCHES[0]).logits - exact).square().sum() / exact.square().sum()) < 0.02


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (None, ConfigError, "has no config.json\n  Pass a Hugging Face folder, or PKG.MOD:FACTORY."),
        ({"model_type": "llama"}, ConfigError, "the architecture .none is named. is not in transformers"),
        (
            {"model_type": "llama", "architectures": ["MyOwn"], "auto_map": {"AutoModel": "own.MyOwn"}},
            ConfigError,
            "the architecture MyOwn is not in transformers .* code in a folder is never run",
        ),
        (
            {"model_type": "own", "architectures": ["MyOwn"], "auto_map": {"AutoConfig": "own.Own"}},
            ConfigError,
            "needs the code in the folder, which is never run\n  Pass PKG.MOD:FACTORY.*compress, which needs no code",
        ),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, FileError, "transformers cannot read it"),
    ],
)
def test_folders_that_cannot_be_loaded(
    config: dict[str, Any] | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "own.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(error, match=message):
        model_in(tmp_path)


@pytest.mark.parametrize("damage", ["weights", "setting"])
def test_damaged_folders(damage: str, tmp_path: Path) -> None:
    built("Llama").save_pretrained(tmp_path)
    if damage == "weights":
        weights = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": "four"}))
    with pytest.raises(FileError, match="transformers cannot read it"):
        model_in(tmp_path)


def test_a_text_in_windows(tmp_path: Path) -> None:
    tokenizer = folder_with(tmp_path / "model", "smollm", {"model_type": "llama"})
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS) * 4, encoding="utf-8")
    found = windows_of(text, tmp_path / "model", 32, 5)
    ids = tokenizer.encode(" ".join(TEXTS) * 4).ids
    assert torch.cat([one["input_ids"] for one in found], 1).flatten().tolist() == ids[:160]
    assert all(one["input_ids"].shape == (1, 32) for one in found)
    assert len(windows_of(text, tmp_path / "model", 32, 10**6)) == len(ids) // 32


def test_a_text_in_another_encoding(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("schön", encoding="latin1")
    with pytest.raises(FileError, match=r"text.txt: is not a text in UTF-8: byte 3 is 0xf6\n  Convert it"):
        windows_of(text, tmp_path, None, 5)


def test_a_text_shorter_than_a_window(tmp_path: Path) -> None:
    folder_with(tmp_path / "model", "smollm", {"model_type": "llama"})
    text = tmp_path / "text.txt"
    text.write_text("A short one.", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"text.txt: has \d+ tokens, and a window has 512\n  Pass a longer"):
        windows_of(text, tmp_path / "model", None, 5)
    with pytest.raises(FileError, match="no tokenizer that transformers can read"):
        windows_of(text, tmp_path, None, 5)


def test_a_tokenizer_that_transformers_fails_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise TypeError("'dict' object is not an instance of 'Sequence'\nwhile processing 'vocab'")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    (tmp_path / "text.txt").write_text("A text.", encoding="utf-8")
    with pytest.raises(FileError, match=r"can read \(TypeError: 'dict' object is not an instance of 'Sequence'\)"):
        windows_of(tmp_path / "text.txt", tmp_path, None, 5)
