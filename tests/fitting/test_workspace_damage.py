"""A workspace that was shared, copied, cut short, edited or mixed: no trial counts without the model it was about."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import pared
from pared import AccuracyCriterion, ConfigError, EvaluationError, FileError, PostTrainingQuantConfig
from pared.fitting.search.evaluate import Score
from pared.fitting.search.search import Judge, search
from pared.fitting.search.workspace import Workspace
from pared.runtime import saving
from pared.runtime.record import record_of
from tests.fitting.fakes import Synthetic, damage_of
from tests.fitting.test_workspace import TRIAL
from tests.fitting.workspace_child import FINGERPRINT


class Counting:
    """A score that falls with the damage, and how often it was asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        return 1 - 1e3 * damage_of(model)


def run(directory: Path) -> tuple[nn.Module, int]:
    """A search, and how many models it scored."""
    score = Counting()
    model = search(Synthetic(), Judge(AccuracyCriterion(), score), workspace=Workspace(directory, FINGERPRINT))
    outcome = record_of(model).outcome
    assert outcome.met
    assert outcome.score == 1 - 1e3 * damage_of(model), "the score is that of the model that is returned"
    return model, score.calls


def lines_of(directory: Path) -> list[str]:
    return (directory / "trials.jsonl").read_text().splitlines(keepends=True)


def swap(directory: Path) -> None:
    """The models of two trials change places."""
    (directory / "trial-1").rename(directory / "other")
    (directory / "trial-2").rename(directory / "trial-1")
    (directory / "other").rename(directory / "trial-2")


def replace_models(directory: Path) -> None:
    """The model of the last trial, whose damage is large, in place of all."""
    last = max(directory.glob("trial-*/best_model.pt"))
    for path in directory.glob("trial-*/best_model.pt"):
        if path != last:
            shutil.copy(last, path)


def cut_short(directory: Path) -> None:
    for path in directory.glob("trial-*/best_model.pt"):
        path.write_bytes(path.read_bytes()[:-100])


def without_models(directory: Path) -> None:
    for path in directory.glob("trial-*"):
        shutil.rmtree(path)


def all_met(directory: Path) -> None:
    lines = [json.loads(line) | {"met": True} for line in lines_of(directory)]
    (directory / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def better_baseline(directory: Path) -> None:
    data = json.loads((directory / "baseline.json").read_text())
    data["eval_func"]["value"] = -1.0
    (directory / "baseline.json").write_text(json.dumps(data))


def of_another_search(directory: Path) -> None:
    """The records and models of a search for another model."""
    other = directory.parent / "another"
    Workspace(other, {"model": "another"}).set_baseline("eval_func", Score(1.0))
    coarse = Synthetic().build(Synthetic().at_damage(0.25))
    Workspace(other, {"model": "another"}).add(TRIAL, partial(saving.save, coarse))
    for name in ("trials.jsonl", "baseline.json"):
        shutil.copy(other / name, directory / name)
    shutil.copytree(other / "trial-1", directory / "trial-1", dirs_exist_ok=True)


def twice(directory: Path) -> None:
    (directory / "trials.jsonl").write_text("".join(2 * lines_of(directory)))


def without_seals(directory: Path) -> None:
    lines = [json.loads(line) for line in lines_of(directory)]
    for line in lines:
        del line["seal"], line["model"]
    (directory / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


DAMAGES: dict[Callable[[Path], None], bool] = {  # and whether trials are repeated
    swap: True,
    replace_models: True,
    cut_short: True,
    without_models: True,
    all_met: True,
    better_baseline: True,
    of_another_search: True,
    without_seals: True,
    twice: False,
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_trial_that_does_not_match_its_model_is_repeated(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, calls = run(tmp_path / "work")
    assert calls == 3, "the float model, and two trials"
    damage(tmp_path / "work")
    again, repeated = run(tmp_path / "work")
    assert damage_of(again) == damage_of(model)
    assert ("is not used" in caplog.text) or ("measured again" in caplog.text)
    assert (repeated > 0) == DAMAGES[damage]
    assert damage_of(run(tmp_path / "work")[0]) == damage_of(model)


def test_a_copy_is_as_good_as_the_original(tmp_path: Path) -> None:
    model, _ = run(tmp_path / "work")
    shutil.copytree(tmp_path / "work", tmp_path / "elsewhere" / "copy")
    shutil.rmtree(tmp_path / "work")
    again, calls = run(tmp_path / "elsewhere" / "copy")
    assert (damage_of(again), calls) == (damage_of(model), 0)


def test_a_model_that_is_replaced_during_the_search_is_not_returned(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, FINGERPRINT)
    workspace.add(TRIAL, partial(saving.save, Synthetic().build(Synthetic().at_damage(1e-3))))
    saving.save(Synthetic().build(Synthetic().at_damage(1e-2)), tmp_path / "trial-1")
    with pytest.raises(FileError, match="its file is not the model that was evaluated"):
        workspace.file(0)


@pytest.mark.parametrize(
    "change",
    [{"damage": "1"}, {"damage": float("nan")}, {"met": 1}, {"nbytes": -1}, {"score": 10**400}, {"seconds": None},
     {"model": {"folder": "../trial-1"}}, {"model": {"folder": "trial-1", "file": "../x"}},
     {"model": {"folder": 3}}, {"model": []}, {"unseen": [1]}],
    ids=str,
)  # fmt: skip
def test_lines_that_make_no_sense(change: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Workspace(tmp_path, FINGERPRINT).add(TRIAL, partial(saving.save, Synthetic().build(Synthetic().at_damage(1e-3))))
    (tmp_path / "trials.jsonl").write_text(json.dumps(json.loads(lines_of(tmp_path)[0]) | change) + "\n")
    try:
        assert Workspace(tmp_path, FINGERPRINT).trials == ()
        assert "line 1 is not used" in caplog.text
    except FileError as error:
        assert error.what.startswith("cannot be read")  # noqa: PT017  # one or the other


@pytest.mark.parametrize("value", [3, None, ["x"], {"a": 1}])
def test_a_fingerprint_that_is_not_text(value: object, tmp_path: Path) -> None:
    Workspace(tmp_path, FINGERPRINT)
    (tmp_path / "fingerprint.json").write_text(json.dumps(FINGERPRINT | {"model": value}))
    with pytest.raises(FileError if value is not None else ConfigError):
        Workspace(tmp_path, FINGERPRINT)


def test_a_full_disk_leaves_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Synthetic().build(Synthetic().at_damage(1e-3))
    workspace = Workspace(tmp_path, FINGERPRINT)
    workspace.add(TRIAL, partial(saving.save, model))
    before = lines_of(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save", lambda *_: tmp_path / "trial-1" / "best_model.pt")
        patch.setattr(os, "fsync", full)  # as when the line was written in part
        with pytest.raises(FileError, match="cannot be written: No space left on device"):
            workspace.add(TRIAL, partial(saving.save, model))
    assert lines_of(tmp_path) == before
    workspace.add(TRIAL, partial(saving.save, model))
    assert len(Workspace(tmp_path, FINGERPRINT).trials) == 2


@pytest.mark.slow
def test_a_second_search_is_refused_before_it_begins(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16)), [torch.ones(4, 8)]
    refused: list[str] = []

    def score(q: nn.Module) -> float:
        with pytest.raises(FileError) as error:
            pared.fit(model, PostTrainingQuantConfig(max_trials=1), x, lambda _: 1.0, workspace=tmp_path, quiet=True)
        refused.append(error.value.what)
        return 1.0

    pared.fit(model, PostTrainingQuantConfig(max_trials=1), x, score, workspace=tmp_path, quiet=True)
    assert refused == ["this very run writes to this directory already"] * 2, "for the float model, and for the trial"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("baseline.json", "corrections.json", "fingerprint.json", "trial-1", "trials.jsonl")
    ]


@pytest.mark.slow
def test_saving_into_the_workspace_of_the_search_that_asks_for_a_score_is_refused_at_once(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16)), [torch.ones(4, 8)]
    saved: list[Path] = []

    def score(q: nn.Module) -> float:
        if hasattr(q, "pared"):
            saved.append(pared.save(q, tmp_path / "mine"))
            pared.save(q, tmp_path)
        return 1.0

    with pytest.raises(EvaluationError, match="this very run writes to this directory already"):
        pared.fit(model, PostTrainingQuantConfig(max_trials=1), x, score, workspace=tmp_path, quiet=True)
    assert len(saved) == 1


@pytest.mark.slow
def test_a_search_without_confirmation_is_another(tmp_path: Path) -> None:
    model, conf = nn.Linear(8, 16), PostTrainingQuantConfig(max_trials=1)

    def score(_: nn.Module) -> float:
        return 1.0

    pared.fit(model, conf, [torch.ones(4, 8)], score, workspace=tmp_path, quiet=True)
    with pytest.raises(ConfigError, match="confirm_func was 'none' and is 'given'"):
        pared.fit(model, conf, [torch.ones(4, 8)], score, score, workspace=tmp_path, quiet=True)
