"""A folder's model, fitted block by block: the artifact, its size, and what is refused before work."""

from pathlib import Path
from typing import Any

import pytest
import torch

import pared
from pared.errors import ConfigError
from pared.fitting.config import PostTrainingQuantConfig, Rule
from pared.fitting.hugging_face.loading import model_in
from pared.fitting.streamed.fit import fit_folder
from tests.fitting.streamed.models import small, some_calls, written

BATCHES = [dict(call.kwargs) for call in some_calls(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(small("Llama", tied=True, layers=3), tmp_path_factory.mktemp("models") / "llama")


def fitted(folder: Path, at: Path, **options: Any) -> Path:
    conf = PostTrainingQuantConfig(approach="weight_only", **options)
    return fit_folder(folder, conf, BATCHES, at / "work", at / "out", quiet=True, dtype="float32").path


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With columns of very different energy, so that scales of columns pay."""
    model = small("Mixtral", layers=2)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "layernorm" in name:
                one.mul_(torch.logspace(-2, 2, 32, base=4)[torch.randperm(32)])
    return written(model, tmp_path_factory.mktemp("models") / "mixtral")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "mixture"])
def test_the_artifact_is_what_the_whole_model_gives(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    model: Any = model_in(folder)
    whole: Any = pared.fit(model, PostTrainingQuantConfig(approach="weight_only"), BATCHES, quiet=True)
    found: Any = pared.load(fitted(folder, tmp_path).parent, model_in(folder), quiet=True)
    ours, theirs = ({one.name: one.format for one in q.pared.plan if "scaled" in one.format} for q in (found, whole))
    assert ours.keys() == theirs.keys()
    assert bool(ours) == (kind == "mixture")
    said, said_whole = ({one.name: one.because for one in q.pared.plan} for q in (found, whole))
    assert said == said_whole  # of experts and routers, too
    with torch.no_grad():
        exact, ours, theirs = (one(**BATCHES[0]).logits for one in (model, found, whole))
    assert {one.name: one.treatment for one in found.pared.plan} == {
        one.name: one.treatment for one in whole.pared.plan
    }
    lost, lost_whole = (float((one - exact).square().sum() / exact.square().sum()) for one in (ours, theirs))
    assert lost < 2 * lost_whole + 1e-4
    assert abs(found.pared.nbytes() / whole.pared.nbytes() - 1) < 0.03
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4.0, 6.0])
def test_the_size_is_kept(folder: Path, tmp_path: Path, bits: float) -> None:
    parameters = sum(one.numel() for one in model_in(folder).parameters())
    most = int(parameters * bits / 8)
    path = fitted(folder, tmp_path, max_size=most, rules=[Rule("*norm*", keep=True), Rule("model.layers.1.*", bits=6)])
    assert 0.9 * most < path.stat().st_size <= most
    found: Any = pared.load(path.parent, model_in(folder), quiet=True)
    assert {one.treatment for one in found.pared.plan if "norm" in one.name} == {"exact"}


@pytest.mark.slow
def test_folders_by_url(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: Any = pytest.importorskip("fsspec").filesystem("memory")
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "cache"))
    files.put(str(folder), "/llama", recursive=True)
    conf = PostTrainingQuantConfig(approach="weight_only")
    with pytest.raises(ConfigError, match=r"workspace='memory:/w': is a URL, and in a workspace files replace others"):
        pared.fit("memory://llama", conf, BATCHES, workspace=Path("memory://w"), output="memory://out", quiet=True)
    path = pared.fit("memory://llama", conf, BATCHES, workspace=tmp_path / "work", output="memory://out", quiet=True)
    assert str(path) == "memory:/out/best_model.safetensors"
    assert {"/out/best_model.safetensors", "/out/config.json"} <= set(files.find("/out"))
    found = pared.evaluate("memory://out", BATCHES[0]["input_ids"], "memory://llama", quiet=True)
    assert found.agreement == 1.0
    files.rm("/", recursive=True)
