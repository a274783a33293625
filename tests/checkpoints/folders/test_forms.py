"""Folders that hold a model in several forms, a part of it, or something that only looks like one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import helper, numpy_helper
from torch import Tensor

import pared
from pared.checkpoints import compress
from pared.errors import FileError

STATE = {"a.weight": torch.randn(16, 32), "b.weight": torch.randn(8, 32), "b.bias": torch.randn(8)}


def both(folder: Path, taken: dict[str, Tensor], other: dict[str, Tensor]) -> Path:
    safetensors.torch.save_file(taken, folder / "model.safetensors")
    torch.save(other, folder / "pytorch_model.bin")
    return folder


def back(source: Path, where: Path) -> dict[str, Tensor]:
    where.mkdir(exist_ok=True)
    small = pared.compress(source, where / "small")
    return safetensors.torch.load_file(pared.expand(small, where / "back.safetensors"))


def test_of_two_forms_the_safetensors_are_taken(tmp_path: Path) -> None:
    newer = {name: tensor + 100 for name, tensor in STATE.items()}
    (tmp_path / "m").mkdir()
    source = both(tmp_path / "m", newer, STATE)
    found = back(source, tmp_path)
    assert set(found) == set(STATE)
    assert torch.allclose(found["a.weight"], newer["a.weight"], atol=1)
    done = compress.run(source, tmp_path / "again", quiet=True)
    assert {left.because for left in done.left_out} == {"a copy of the model, in pytorch_model.bin"}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (STATE | {"a.weight": torch.randn(17, 32)}, r"a.weight: has the shape \[17, 32\] in pytorch_model.bin, and"),
        (STATE | {"c.weight": torch.randn(4, 4)}, "pytorch_model.bin has c.weight, and the file that is taken, model."),
    ],
)
def test_two_forms_that_disagree_are_refused(tmp_path: Path, other: dict[str, Tensor], words: str) -> None:
    both(tmp_path, STATE, other)
    with pytest.raises(FileError, match=words):
        pared.compress(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pared.compress(tmp_path / "model.safetensors", tmp_path / "out")  # as the error says


def test_what_libraries_leave_out_of_one_form_may_be_missing(tmp_path: Path) -> None:
    weight = STATE["a.weight"]
    other = STATE | {
        "head.weight": weight,
        "copied.weight": weight.clone(),
        "position_ids": torch.arange(9)[None],
        "rotary.inv_freq": torch.ones(7),
    }
    (tmp_path / "m").mkdir()
    assert set(back(both(tmp_path / "m", STATE, other), tmp_path)) == set(STATE)


def test_a_half_precision_form_is_a_copy(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    both(tmp_path / "m", STATE, {name: tensor.half() for name, tensor in STATE.items()})
    assert set(back(tmp_path / "m", tmp_path)) == set(STATE)


def test_shards_beside_a_file_of_another_form(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    names = list(STATE)
    for i, part in enumerate((names[:1], names[1:])):
        state = {name: STATE[name] for name in part}
        safetensors.torch.save_file(state, tmp_path / "m" / f"model-0000{i + 1}-of-00002.safetensors")
    torch.save(STATE, tmp_path / "m" / "pytorch_model.bin")
    assert set(back(tmp_path / "m", tmp_path)) == set(STATE)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12345\n"


@pytest.mark.parametrize("names", [["model.safetensors"], ["model-00001-of-00002.safetensors", "x"], ["weights.bin"]])
def test_a_clone_without_its_large_files_says_how_to_get_them(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    for name in ["model-00002-of-00002.safetensors", *names] if "x" in names else names:
        (tmp_path / "m" / name).write_text(POINTER)
    for path in (tmp_path / "m", tmp_path / "m" / names[0]):
        for verb in (pared.inspect, lambda path: pared.compress(path, tmp_path / "out")):
            with pytest.raises(FileError, match=r"is a Git LFS pointer(.|\n)*git lfs pull"):
                verb(path)


def test_one_pointer_among_shards_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_text(POINTER)
    safetensors.torch.save_file(STATE, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(FileError, match=r"model-00001-of-00002.safetensors: is a Git LFS pointer"):
        pared.compress(tmp_path, tmp_path / "out")


def test_a_pointer_in_another_form_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    safetensors.torch.save_file(STATE, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "pytorch_model.bin").write_text(POINTER)
    assert set(back(tmp_path / "m", tmp_path)) == set(STATE)


def test_an_adapter_keeps_its_names_and_is_called_one(tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    source.mkdir()
    state = {f"base_model.model.layers.{i}.lora_{x}.weight": torch.randn(8, 8) for i in range(2) for x in "AB"}
    safetensors.torch.save_file(state, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    done = compress.run(source, tmp_path / "small", quiet=True)
    assert "an adapter of PEFT: the model that it was trained for is not in it" in str(done)
    assert done.copied == ("adapter_config.json",)
    found = safetensors.torch.load_file(pared.expand(tmp_path / "small", tmp_path / "big"))
    assert set(found) == set(state)
    assert sorted(path.name for path in (tmp_path / "big").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors")
    ]


def test_an_onnx_model_with_its_data_gives_its_weights(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.arange(4096, dtype=np.float32).reshape(64, 64), "w")
    model = helper.make_model(helper.make_graph([], "g", [], [], [weight]))
    (tmp_path / "m").mkdir()
    onnx.save(model, str(tmp_path / "m" / "model.onnx"), save_as_external_data=True, location="weights.data")
    (tmp_path / "m" / "config.json").write_text("{}")
    done = compress.run(tmp_path / "m", tmp_path / "small", quiet=True)
    assert done.copied == ("config.json",)  # not the data, whatever they are called
    assert "left out: the graph of the model; expand gives its weights alone" in str(done)
    safetensors.torch.save_file(STATE, tmp_path / "m" / "model.safetensors")
    assert set(back(tmp_path / "m", tmp_path / "both")) == set(STATE)


def test_several_quantizations_of_one_model(tmp_path: Path) -> None:
    for name in ("m-Q4.safetensors", "m-Q8.safetensors"):
        safetensors.torch.save_file(STATE, tmp_path / name)
    with pytest.raises(
        FileError, match=r"holds several models: m-Q4.safetensors, m-Q8.safetensors\n  Pass one of them"
    ):
        pared.compress(tmp_path, tmp_path / "out")
