"""A folder's model is calibrated with whatever calibrates a model in memory, and nothing is left of what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pared
from pared.errors import CalibrationError, ConfigError
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.hugging_face.loading import skeleton_in
from pared.fitting.streamed.inputs import calls_of
from pared.fitting.streamed.parts.blocks import NotInBlocks
from tests.fitting.streamed.models import small, some_calls, written
from tests.targets.families.models import built
from tests.targets.gguf.folders import TEXTS, folder_with

pytestmark = pytest.mark.slow

IDS = torch.randint(0, 320, (200,), generator=torch.Generator().manual_seed(0))
SOURCES: dict[str, Callable[[Path], Any]] = {
    "a path": lambda place: place / "text.txt",
    "the name of a file": lambda place: str(place / "text.txt"),
    "a file of tokens": lambda place: place / "ids.npy",
    "texts": lambda _: list(TEXTS) * 4,
    "rows": lambda _: [{"text": text} for text in TEXTS] * 4,
    "samples": lambda _: IDS.reshape(10, 20).tolist(),
    "tokens": lambda _: IDS,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    model: Any = built("Llama", max_position_embeddings=32, num_hidden_layers=2)
    model.save_pretrained(place / "model")
    folder_with(place / "model", "smollm", model.config.to_dict())
    (place / "text.txt").write_text(" ".join(TEXTS) * 4, encoding="utf-8")
    np.save(place / "ids.npy", IDS.numpy())
    return place


@pytest.mark.parametrize("kind", SOURCES)
def test_all_sources_calibrate(kind: str, folder: Path) -> None:
    source = SOURCES[kind](folder)
    found = calls_of(source, folder / "model", skeleton_in(folder / "model"), 5)
    expected = pared.calibration(source, folder / "model", samples=5)
    assert len(found) == len(expected) > 1
    for call, batch in zip(found, expected, strict=True):
        assert torch.equal(call.kwargs["input_ids"], batch["input_ids"])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (lambda model: model(input_ids=IDS[None]), ConfigError, "are a function that calls a model"),
        (5, ConfigError, "cannot make calibration data of a int"),
        ([], CalibrationError, "the calibration data are empty"),
        ([{"input_ids": torch.full((1, 4), 10**6)}], CalibrationError, "has the token 1000000, and the model's table"),
    ],
)
def test_other_calibration_data_are_refused(source: Any, error: type[Exception], message: str, folder: Path) -> None:
    with pytest.raises(error, match=message):
        pared.fit(folder / "model", None, source, output=folder / "out", quiet=True)
    assert {path.name for path in folder.iterdir()} == {"model", "text.txt", "ids.npy"}


def test_a_workspace_that_nobody_chose_stays_until_the_fit_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = written(small("Llama", layers=2), tmp_path / "model")
    batches = [dict(call.kwargs) for call in some_calls(2)]
    conf = PostTrainingQuantConfig(approach="weight_only")
    with monkeypatch.context() as broken:
        broken.setattr("pared.fitting.streamed.fit.pretrained.complete", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pared.fit(folder, conf, batches, output=tmp_path / "out", quiet=True)
    assert f"what is not in memory is in {tmp_path / 'out.work'}" in caplog.text
    assert list((tmp_path / "out.work").glob("traced-*"))
    path = pared.fit(folder, conf, batches, output=tmp_path / "out", quiet=True)
    assert path == tmp_path / "out" / "best_model.safetensors"
    assert {one.name for one in tmp_path.iterdir()} == {"model", "out"}
    with pytest.raises(ConfigError, match="for which a workspace is needed"):
        pared.fit(folder, conf, batches, quiet=True)


def test_a_model_that_is_refused_leaves_no_output(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=96, d_model=32, num_layers=3, num_heads=2, d_kv=16, d_ff=64)
    folder = written(transformers.T5EncoderModel(config).eval(), tmp_path / "model")
    batches = [dict(call.kwargs) for call in some_calls(2)]
    with pytest.raises(NotInBlocks, match="block 1 gets argument 2, which depends on weights"):
        pared.fit(folder, None, batches, workspace=tmp_path / "work", output=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_what_the_model_raises_names_the_batch(tmp_path: Path) -> None:
    folder = written(small("Llama", layers=2), tmp_path / "model")
    good, bad = (dict(call.kwargs) for call in some_calls(2))
    bad["input_ids"] = torch.zeros(1, 8)  # no tokens
    with pytest.raises(CalibrationError, match="^calibration: batch 1: the model raised "):
        pared.fit(folder, None, [good, bad], workspace=tmp_path / "work", output=tmp_path / "out", quiet=True)
