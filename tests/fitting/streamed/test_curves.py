"""What each size of a folder's model costs, and about how large it becomes, with one block in memory at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch

import pared
from pared.errors import CalibrationError, ConfigError
from pared.fitting.config import PostTrainingQuantConfig, Rule
from pared.fitting.hugging_face.loading import model_in
from pared.fitting.streamed.parts.blocks import NotInBlocks
from tests.fitting.streamed.models import small, some_calls, written

BATCHES = [dict(call.kwargs) for call in some_calls(3)]
CONF = PostTrainingQuantConfig(approach="weight_only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(small("Llama", layers=2), tmp_path_factory.mktemp("models") / "llama")


def score(model: Any) -> float:
    with torch.no_grad():
        return -float(model(**BATCHES[0]).logits.square().mean())


@pytest.mark.slow
def test_the_curve_is_that_of_the_whole_model(folder: Path, tmp_path: Path) -> None:
    found = pared.trade_off(folder, CONF, BATCHES, points=4, workspace=tmp_path / "work", quiet=True)
    whole = pared.trade_off(model_in(folder), CONF, BATCHES, points=4, quiet=True)
    assert len(found.points) == len(whole.points) == 4
    for one, other in zip(found.points, whole.points, strict=True):
        assert one.damage == pytest.approx(other.damage, rel=0.1)
        assert one.nbytes == pytest.approx(other.nbytes, abs=1000)  # an index is estimated otherwise
    scored = pared.trade_off(str(folder), CONF, BATCHES, score, points=2, workspace=str(tmp_path / "work"), quiet=True)
    assert scored.baseline == pytest.approx(score(model_in(folder)), rel=1e-5)
    assert [one.score is not None for one in scored.points] == [True, True]


@pytest.mark.parametrize("options", [{}, {"rules": [Rule("*mlp*", bits=4)]}, {"target": "compressed-tensors"}])
def test_the_estimate_is_that_of_the_whole_model(
    folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = PostTrainingQuantConfig(calibration_sampling_size=7, **options)
    found, whole = pared.estimate(folder, conf, BATCHES), pared.estimate(model_in(folder), conf)
    assert (found.nbytes, found.original_nbytes) == (whole.nbytes, whole.original_nbytes)
    assert found.seconds > 0
    monkeypatch.setattr("pared.fitting.estimate.seconds_of_a_call", lambda *_: 1e6)
    assert 7e6 < pared.estimate(folder, conf, BATCHES).seconds < 8e6  # of each call


@pytest.mark.parametrize("verb", [pared.trade_off, pared.estimate])
@pytest.mark.parametrize(
    ("conf", "error", "message"),
    [
        (PostTrainingQuantConfig(approach="static"), ConfigError, "is for a model in memory"),
        (PostTrainingQuantConfig(target="onnx"), ConfigError, "needs the graph of the whole model"),
        (PostTrainingQuantConfig(rules=[Rule("nothing", keep=True)]), ConfigError, "matches no tensor"),
    ],
)
def test_what_is_wrong_is_said_before_work(
    verb: Any, conf: PostTrainingQuantConfig, error: type[Exception], message: str, folder: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = {} if verb is pared.estimate else {"workspace": tmp_path / "work", "quiet": True}
    with pytest.raises(error, match=message):
        verb(folder, conf, BATCHES, **more)
    assert not (tmp_path / "work").exists()


def test_what_the_curve_of_a_folder_needs_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pared\.trade_off: there are no calibration data"):
        pared.trade_off(folder, CONF, workspace=tmp_path)
    with pytest.raises(ConfigError, match=r"pared\.trade_off: .* for which a workspace is needed"):
        pared.trade_off(folder, CONF, BATCHES)
    with pytest.raises(ConfigError, match="points"):
        pared.trade_off(folder, CONF, BATCHES, points=0, workspace=tmp_path)


def test_options_of_folders_are_refused_for_models(tmp_path: Path) -> None:
    net = torch.nn.Linear(8, 8)
    with pytest.raises(ConfigError, match=r"pared\.trade_off: workspace and a text for calibration: for the path"):
        pared.trade_off(net, CONF, tmp_path / "text.txt", workspace=tmp_path)
    with pytest.raises(ConfigError, match=r"pared\.estimate: a text for calibration: for the path"):
        pared.estimate(net, CONF, "text.txt")
    with pytest.raises(ConfigError, match=r"pared\.fit: output: for the path"):
        pared.fit(net, CONF, output=tmp_path)  # type: ignore[call-overload]  # it is refused


def test_a_dry_run_tells_what_is_not_in_blocks(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=96, d_model=32, num_layers=3, num_heads=2, d_kv=16, d_ff=64)
    folder = written(transformers.T5EncoderModel(config).eval(), tmp_path / "model")
    with pytest.raises(NotInBlocks, match="which depends on weights"):
        pared.estimate(folder, None, BATCHES)
    with pytest.raises(CalibrationError, match="has the token 1000"):
        pared.estimate(folder, None, [{"input_ids": torch.full((1, 4), 1000)}])


def test_a_decoder_without_inputs_is_told(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=96, d_model=32, num_layers=3, num_heads=2, d_kv=16, d_ff=64)
    folder = written(transformers.T5ForConditionalGeneration(config).eval(), tmp_path / "model")
    ids = [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}]
    for act in (
        lambda: pared.estimate(folder, None, ids),
        lambda: pared.fit(folder, None, ids, workspace=tmp_path / "w"),
    ):
        with pytest.raises(CalibrationError, match="batch 0: there are no inputs for the decoder, without which the"):
            act()
