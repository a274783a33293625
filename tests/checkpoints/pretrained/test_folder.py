"""Finished artifacts become folders that `from_pretrained` opens; nothing of the float model is lost on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import pared
from pared.checkpoints.pretrained.folder import check_note, complete, note
from pared.errors import ConfigError, CorruptError
from tests.runtime.hugging_face.folders import EIGHT_BITS, IDS, WEIGHTS, fitted, folder, source, text_of
from tests.targets.families.models import built

pytestmark = pytest.mark.slow


def test_an_artifact_and_its_source_become_a_folder(tmp_path: Path) -> None:
    artifact = pared.save(fitted(), tmp_path, container="safetensors")
    (tmp_path / "best_model.pt").write_bytes(pared.save(fitted(), tmp_path / "old").read_bytes())
    complete(artifact, source(), "LlamaForCausalLM")
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    expected = {"best_model.safetensors", "deploy.yaml", "engine.json", "config.json", "generation_config.json"}
    assert names == expected | {"tokenizer.json", "tokenizer_config.json"}
    before, after = (json.loads((place / "config.json").read_text()) for place in (source(), tmp_path))
    assert after == {**before, "dtype": "float32", "quantization_config": note()}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(IDS).logits, fitted()(IDS, use_cache=True).logits)
    assert text_of(model) == text_of(fitted())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        tokenizer("The water")["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(source())("The water")["input_ids"]
    )
    assert tokenizer.chat_template is not None


def test_the_tokenizer_comes_along_when_a_model_is_saved(tmp_path: Path) -> None:
    assert (folder() / "tokenizer.json").read_bytes() == (source() / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_text("{}")
    fitted().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_a_model_of_no_folder_has_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    pared.fit(built("Llama"), EIGHT_BITS, [{"input_ids": IDS}], quiet=True).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists(), "of the directory that happens to be the current one"


def test_files_of_strangers_stay(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "best_model.pt")
    fitted().save_pretrained(tmp_path)
    assert torch.load(tmp_path / "best_model.pt")["weight"].tolist() == [1, 1]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    fitted().save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_a_model_is_uploaded_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "push_to_hub", lambda self, *args, **named: asked.append((args, named))
    )
    fitted().save_pretrained(tmp_path / "mine", push_to_hub=True, token="t")
    assert asked == [(("mine",), {"max_shard_size": "50GB", "token": "t"})]


def test_the_folder_of_the_float_model_is_not_overwritten(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "best_model.safetensors")
    with pytest.raises(ConfigError, match="is the folder of the float model, whose config.json would be lost"):
        complete(tmp_path / "best_model.safetensors", tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model-00001-of-00002.bin", "model.fp16.safetensors"])
@pytest.mark.parametrize("write", ["save_pretrained", "complete", "fit"])
def test_a_model_that_is_there_still_opens(write: str, name: str, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(source(), place)
    (place / "model.safetensors").rename(place / name)
    if write == "complete":
        pared.save(fitted(), place, container="safetensors")
    before = contents(place)
    acts: dict[str, Callable[[], object]] = {
        "save_pretrained": lambda: fitted().save_pretrained(place),
        "complete": lambda: complete(place / "best_model.safetensors", source()),
        "fit": lambda: pared.fit(source(), WEIGHTS, [{"input_ids": IDS}], output=place, quiet=True),
    }
    with pytest.raises(ConfigError, match=rf"model: holds a model that pared did not write \({name}\), whose"):
        acts[write]()
    assert contents(place) == before
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_ours_is_written_again(tmp_path: Path) -> None:
    fitted().save_pretrained(tmp_path)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"left by an earlier version")
    fitted().save_pretrained(tmp_path)
    assert text_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) == text_of(fitted())


def test_artifacts_that_nobody_would_find(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not called best_model.safetensors"):
        complete(pared.save(fitted(), tmp_path), source())
    with pytest.raises(
        ConfigError, match=r"has no config.json, which says what the model is\n  Pass the folder that the"
    ):
        complete(tmp_path / "best_model.safetensors", tmp_path / "old")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("[1]")
    with pytest.raises(CorruptError, match="is not a JSON object"):
        complete(tmp_path / "best_model.safetensors", tmp_path / "damaged")


def test_the_note_is_read_as_it_is_written() -> None:
    check_note(note())
    check_note({"quant_method": "pared"})
    with pytest.raises(ConfigError, match="quant_method='other' is not one of 'pared'"):
        check_note({"quant_method": "other"})
