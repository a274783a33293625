"""Folders that cannot be opened, and options that cannot be obeyed: what is wrong, before anything is read."""

from __future__ import annotations

import io
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pared
from pared import ConfigError, CorruptError, FileError, MismatchError, ParedError, VersionError
from pared.files.safetensors_file import write_safetensors
from pared.runtime.hugging_face.quantizer import Note
from tests.runtime.hugging_face.folders import WEIGHTS, folder, source
from tests.targets.families.models import built

pytestmark = pytest.mark.slow

ARTIFACT = "best_model.safetensors"


def cut(place: Path) -> None:
    path = place / ARTIFACT
    path.write_bytes(path.read_bytes()[:-500])


def flip(place: Path) -> None:
    data = bytearray((place / ARTIFACT).read_bytes())
    data[len(data) // 2] ^= 255
    (place / ARTIFACT).write_bytes(data)


def newer(place: Path) -> None:
    buffer = io.BytesIO()
    write_safetensors(buffer, zlib.compress(b'{"pared": 99, "tensors": [], "modules": {}, "provenance": {}}'), (), 0)
    (place / ARTIFACT).write_bytes(buffer.getvalue())


def of_another(place: Path) -> None:
    other: Any = pared.fit(built("Llama", num_hidden_layers=1), WEIGHTS, quiet=True)
    pared.save(other, place, container="safetensors")


def with_note(**changes: Any) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        config = json.loads((place / "config.json").read_text())
        config["quantization_config"] |= changes
        (place / "config.json").write_text(json.dumps(config))

    return change


def plain(place: Path) -> None:
    (place / ARTIFACT).write_bytes((source() / "model.safetensors").read_bytes())


HOSTILE: dict[str, tuple[Callable[[Path], object], type[ParedError], str]] = {
    "no artifact": (lambda place: (place / ARTIFACT).unlink(), FileError, "and best_model.safetensors is missing"),
    "cut": (cut, CorruptError, "best_model.safetensors: "),
    "flipped": (flip, CorruptError, "it is damaged"),
    "newer artifact": (newer, VersionError, "has version 99 of the format, and this pared reads up to"),
    "of another model": (of_another, MismatchError, "the artifact lacks model.layers.1"),
    "newer note": (with_note(version=2), VersionError, "its quantization_config is of version 2, and this version"),
    "unknown key": (with_note(rotated=True), VersionError, "its quantization_config has a key 'rotated'"),
    "unknown memory": (
        with_note(memory="tiny"),
        ConfigError,
        "config.json: memory='tiny' is not one of 'fast', 'small'",
    ),
    "a float file": (plain, FileError, "is a .safetensors file, not an artifact of pared"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_folders(case: str, tmp_path: Path) -> None:
    spoil, error, message = HOSTILE[case]
    shutil.copytree(folder(), tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", ["disk", "meta"])
def test_places_that_hold_no_model(place: str) -> None:
    with pytest.raises(ConfigError, match="device_map=.* divides the model, and a quantized model is in one place"):
        transformers.AutoModelForCausalLM.from_pretrained(folder(), device_map={"": place})


def test_a_model_in_two_places() -> None:
    with pytest.raises(ConfigError, match='pass "auto" or "cpu": int8 kernels run on the CPU'):
        transformers.AutoModelForCausalLM.from_pretrained(folder(), device_map={"model": "cpu", "lm_head": "cuda:0"})


def test_another_class() -> None:
    with pytest.raises(MismatchError, match="holds a LlamaForCausalLM, and LlamaModel was asked for"):
        transformers.AutoModel.from_pretrained(folder())


def test_float_models_are_not_quantized_while_they_are_loaded() -> None:
    with pytest.raises(ConfigError, match="holds a float model, which is not quantized while it is loaded"):
        transformers.AutoModelForCausalLM.from_pretrained(source(), quantization_config=Note())


@pytest.mark.parametrize(("option", "value"), [("variant", "fp16"), ("state_dict", {"a": torch.ones(1)})])
def test_options_of_save_pretrained(option: str, value: object, tmp_path: Path) -> None:
    q: Any = pared.fit(built("GPT-2", n_layer=1), WEIGHTS, quiet=True)
    with pytest.raises(ConfigError, match=f"save_pretrained: {option} cannot be chosen for a quantized model"):
        q.save_pretrained(tmp_path / "out", **{option: value})
    assert not (tmp_path / "out").exists()


def test_classes_of_other_packages_keep_the_refusal(tmp_path: Path) -> None:
    class Other(torch.nn.Linear):
        def save_pretrained(self, _directory: object) -> None:
            raise AssertionError

    q: Any = pared.fit(Other(64, 64), WEIGHTS, quiet=True)
    with pytest.raises(pared.ModelError, match="save_pretrained would write codes"):
        q.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
