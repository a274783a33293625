"""A folder's model, searched by scores: the float one is read block by block, the others stay in codes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pared
from pared import readers
from pared.artifact.outcome import Outcome
from pared.errors import ConfigError, EvaluationError
from pared.fitting.config import AccuracyCriterion, PostTrainingQuantConfig
from pared.fitting.hugging_face.loading import model_in, skeleton_in
from pared.fitting.streamed.fit import fit_folder
from pared.fitting.streamed.parts.blocks import find_blocks
from pared.fitting.streamed.parts.running import running
from pared.fitting.streamed.parts.weights import weights_of
from pared.fitting.streamed.result import Fitted
from pared.model.tensors import find_tensors
from tests.fitting.streamed.models import small, some_calls, written

BATCHES = [dict(call.kwargs) for call in some_calls(4)]
UNSEEN = [dict(call.kwargs) for call in some_calls(9)[4:]]
CONF = PostTrainingQuantConfig(
    approach="weight_only", accuracy_criterion=AccuracyCriterion(criterion="absolute", tolerable_loss=0.02)
)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in UNSEEN])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(small("Llama", layers=2), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(small("Mixtral", layers=2), tmp_path_factory.mktemp("models") / "mixtral")


class Score:
    """How near a model's logits are to the float model's, for each call; counts the models."""

    def __init__(self, folder: Path) -> None:
        self.exact = logits(model_in(folder))
        self.scored = 0
        self.fatal = 0  # the call during which Ctrl-C comes; 0: none

    def __call__(self, model: nn.Module) -> torch.Tensor:
        self.scored += 1
        if self.scored == self.fatal:
            raise KeyboardInterrupt
        lost = (logits(model) - self.exact).square().sum((1, 2)) / self.exact.square().sum((1, 2))
        return -lost


def fitted(folder: Path, at: Path, score: Any, conf: PostTrainingQuantConfig = CONF, **options: Any) -> Fitted:
    return fit_folder(
        folder, conf, BATCHES, at / "work", at / "out", eval_func=score, quiet=True, dtype="float32", **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "mixture"])
def test_the_search_is_that_of_the_whole_model(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    score = Score(folder)
    found = fitted(folder, tmp_path, score)
    whole: Any = pared.fit(model_in(folder), CONF, BATCHES, score, quiet=True)
    assert found.outcome.met
    assert whole.pared.met
    assert found.outcome.baseline == pytest.approx(whole.pared.baseline, abs=1e-6)
    other = pared.save(whole, tmp_path / "whole", container="safetensors")
    assert found.path.stat().st_size == pytest.approx(other.stat().st_size, rel=0.05)
    loaded: Any = pared.load(found.path.parent, skeleton_in(folder), memory="small", quiet=True)
    assert loaded.pared.met
    assert loaded.pared.score == pytest.approx(float(score(loaded)[0::2].mean()), abs=1e-6)
    text = found.report()
    assert "criterion met" in text
    assert "trial" in text
    assert len(found.curve.points) > len(found.outcome.trials)


@pytest.mark.slow
def test_a_search_that_was_interrupted_goes_on(folder: Path, tmp_path: Path) -> None:
    score = Score(folder)
    whole = fitted(folder, tmp_path / "a", score)
    assert len(whole.outcome.trials) > 1
    score.scored, score.fatal = 0, 2
    with pytest.raises(KeyboardInterrupt):  # the float model was scored, and the first trial is not
        fitted(folder, tmp_path / "b", score)
    score.scored, score.fatal = 0, 2
    stopped = fitted(folder, tmp_path / "b", score)  # the best of one trial
    assert len(stopped.outcome.trials) == 1
    score.fatal = score.scored = 0
    for file in (tmp_path / "b" / "work" / "coded").glob("*[0-9]-[0-9]*.bin"):
        file.unlink()  # what the search decides is rounded again
    again = fitted(folder, tmp_path / "b", score)
    assert score.scored == len(whole.outcome.trials) - 1
    assert again.path.read_bytes() == whole.path.read_bytes()
    trials = [[replace(one, seconds=0) for one in each.outcome.trials] for each in (whole, again)]
    assert trials[0] == trials[1]


@pytest.mark.slow
def test_a_size_bounds_the_search_and_other_criteria_use_the_same_sweeps(folder: Path, tmp_path: Path) -> None:
    score = Score(folder)
    free = fitted(folder, tmp_path, score)
    sweeps = sorted(tmp_path.glob("work/traced-*"))
    before = [path.stat().st_mtime_ns for path in sweeps]
    most = free.path.stat().st_size * 9 // 10
    bounded = fitted(folder, tmp_path, score, replace(CONF, max_size=most))
    assert bounded.path.stat().st_size <= most
    assert bounded.outcome.met is False
    assert bounded.outcome.contributors
    assert [path.stat().st_mtime_ns for path in sweeps] == before


def test_the_float_model_is_read_block_by_block(folder: Path) -> None:
    model: Any = model_in(folder)
    tensors = find_tensors(skeleton_in(folder))
    with readers.open_listing(folder) as listing:
        weights, blocks = weights_of(tensors, listing), find_blocks(tensors)
        with running(weights, blocks) as other:
            torch.testing.assert_close(logits(other), logits(model))
            inside = dict(other.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
            assert inside.device == torch.device("cpu")
            assert bool(inside.isnan().all())  # not a number that anyone could take for a weight
            assert inside.untyped_storage().nbytes() == 4
        assert all(one.tensor.is_meta for one in tensors if one.kind == "parameter")
        assert "forward" not in vars(tensors.model.get_submodule(blocks.names[0]))


@pytest.mark.slow
def test_two_versions_of_a_tensor_are_kept_and_others_rounded_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damages = [1e-3, 1e-2, 1e-1]
    versions: list[int] = []

    def first_of(count: int) -> Any:
        def searching(compressor: Any, *_: Any, **__: Any) -> Any:
            built = []
            for damage in damages[:count]:
                built.append(compressor.build(compressor.at_damage(damage)))
                names = [path.name.partition("-")[0] for path in (tmp_path / "work" / "coded").glob("*.bin")]
                versions.append(max(map(names.count, names)))
            missing = [one for one in built[0].assembly.files if not one.path.is_file()]
            assert bool(missing) == (count == 3)
            return compressor.told(built[0], Outcome(True, 0.5, 0.5, 0.0))

        return searching

    written = []
    for count in (1, 2, 3):
        monkeypatch.setattr("pared.fitting.streamed.phases.search", first_of(count))
        written.append(fitted(folder, tmp_path, lambda _: 0.5).path.read_bytes())
    assert max(versions) == 2
    assert written[0] == written[1] == written[2]


def test_what_is_wrong_is_said_before_the_sweeps(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        pared.fit(folder, CONF, BATCHES, 3, workspace=tmp_path / "w")  # type: ignore[call-overload]  # it is refused
    with pytest.raises(ConfigError, match="a confirm_func but no eval_func"):
        pared.fit(folder, CONF, BATCHES, None, lambda _: 1.0, workspace=tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_what_a_function_raises_is_said(folder: Path, tmp_path: Path) -> None:
    def wrong(_: nn.Module) -> float:
        raise ValueError("no such text")

    with pytest.raises(EvaluationError, match="raised ValueError: no such text"):
        fitted(folder, tmp_path, wrong)
