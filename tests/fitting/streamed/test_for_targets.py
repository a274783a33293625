"""A folder's model, fitted block by block for other runtimes: the files that the whole model in memory gives."""

from pathlib import Path
from typing import Any

import pytest
import torch

import pared
from pared import readers
from pared.errors import ConfigError
from pared.fitting.config import PostTrainingQuantConfig, Rule
from pared.fitting.hugging_face.loading import model_in
from pared.fitting.streamed.fit import fit_folder
from pared.fitting.streamed.result import Fitted
from tests.fitting.streamed.models import some_calls
from tests.fitting.streamed.models import written as in_folder
from tests.targets.gguf.folders import folder_with

transformers: Any = pytest.importorskip("transformers")
BATCHES = [dict(call.kwargs) for call in some_calls(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With matrices of 128 columns, for which every runtime has formats."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=64,
    )
    place = tmp_path_factory.mktemp("models") / "llama"
    folder_with(place, "smollm")
    return in_folder(transformers.AutoModelForCausalLM.from_config(config), place)


def fitted(folder: Path, at: Path, target: str, **options: Any) -> Fitted:
    conf = PostTrainingQuantConfig(target=target, **options)
    return fit_folder(folder, conf, BATCHES, at / "work", at / "out", quiet=True, dtype="float32")


def numbers(place: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of files, with the sums of their bytes."""
    with readers.open_listing(place) as listing:
        return {one.name: (*one.shape, one.nbytes) for one in listing.tensors}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "mlx", "gguf"])
def test_files_are_those_of_the_whole_model(folder: Path, tmp_path: Path, target: str) -> None:
    linear, tables = 7 * sum(one.numel() for one in model_in(folder).parameters()) // 8, 2 * 512 * 128
    most = linear if target == "gguf" else linear + 4 * tables - 7 * tables // 8  # others have them in floats
    found = fitted(folder, tmp_path, target, max_size=most)
    conf = PostTrainingQuantConfig(target=target, max_size=most)
    whole = pared.fit(model_in(folder), conf, BATCHES, quiet=True)
    written = Path(pared.export(whole, tmp_path / "whole", to=target, folder=folder).path)
    ours, theirs = (numbers(one if one.suffix == ".gguf" else one.parent) for one in (found.path, written))
    assert ours == theirs
    assert found.nbytes <= most + 20_000  # the tokenizer comes on top
    assert target.partition("-")[0] in found.report().lower()


@pytest.mark.slow
def test_models_are_scored_as_they_are_loaded(folder: Path, tmp_path: Path) -> None:
    def score(model: Any) -> float:
        with torch.no_grad():
            return -float(model(**BATCHES[0]).logits.square().mean())

    conf = PostTrainingQuantConfig(target="gguf", max_trials=1)
    found = fit_folder(
        folder, conf, BATCHES, tmp_path / "w", tmp_path / "o", eval_func=score, quiet=True, dtype="float32"
    )
    whole = pared.load(tmp_path / "w" / "artifact", model_in(folder), quiet=True)
    assert found.outcome.score == pytest.approx(score(whole), rel=1e-5)
    assert found.outcome.baseline == pytest.approx(score(model_in(folder)), rel=1e-5)


@pytest.mark.slow
def test_a_graph_needs_the_whole_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the graph of the whole model"):
        fitted(folder, tmp_path, "onnx")
    with pytest.raises(ConfigError, match="has no format of at most 1 bits"):
        fitted(folder, tmp_path, "gptq", rules=[Rule("model.layers.0.*", bits=1)])
    assert not (tmp_path / "work").exists()
