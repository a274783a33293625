"""Where a fit of a folder writes: nothing of anybody else's is lost or taken for the model's."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pared
from pared.errors import ConfigError, FileError
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.hugging_face.loading import model_in
from pared.runtime.profile.profile import ENGINE_FILE, Profile, this_machine
from tests.fitting.streamed.models import small, some_calls, written

BATCHES = [dict(call.kwargs) for call in some_calls(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(small("Llama", tied=True, layers=2), tmp_path_factory.mktemp("models") / "llama")


def test_a_directory_of_somebody_else_is_not_deleted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is where the workspace would be, and holds something else"):
        pared.fit(folder, None, BATCHES, output=tmp_path / "out", quiet=True)
    assert [one.name for one in tmp_path.rglob("*")] == ["out.work", "precious.txt"]


def test_a_file_where_the_workspace_would_be_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.work").write_text("mine")
    with pytest.raises(FileError, match="out.work: cannot be read: Not a directory"):
        pared.fit(folder, None, BATCHES, output=tmp_path / "out", quiet=True)


def test_a_checkpoint_that_is_quantized_already_is_refused(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj" in name)
    steps = tensors[name].abs().amax(1, keepdim=True) / 127
    tensors[f"{name}_scale"] = steps.clone()
    tensors[name] = (tensors[name] / steps).round().to(torch.int8)
    save_file(tensors, file, {"format": "pt"})
    for act in (pared.fit, pared.trade_off):
        with pytest.raises(ConfigError, match="it is quantized already .*int8"):
            act(source, None, BATCHES, workspace=tmp_path / "work", quiet=True)


@pytest.mark.parametrize("place", ["out", "model", "model/inside"])
def test_a_workspace_is_apart(place: str, folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.symlink_to(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match="is the workspace, and is in the model's folder or the output itself"):
        pared.fit(model, None, BATCHES, workspace=tmp_path / place, output=tmp_path / "out", quiet=True)
    assert sorted(folder.rglob("*")) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_times_of_another_model_are_forgotten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = PostTrainingQuantConfig(approach="weight_only", quant_level=0)
    pared.save(pared.fit(model_in(folder), whole, BATCHES, quiet=True), out, container="safetensors")
    # What was timed depends on the machine: here stands for certain what holds for another model.
    (out / ENGINE_FILE).write_text(Profile(this_machine(), score=0.5).to_json())
    pared.fit(folder, PostTrainingQuantConfig(approach="weight_only"), BATCHES, output=out, quiet=True)
    assert (out / ENGINE_FILE).read_text() == Profile(this_machine()).to_json()
    assert not (tmp_path / "out.work").exists()
