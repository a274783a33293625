"""The workspace: what a killed search has found out is not found out again."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pared
from pared import AccuracyCriterion, ConfigError, FileError, PostTrainingQuantConfig, Rule
from pared.artifact.outcome import Confirmation, Outcome, Trial
from pared.fitting.measured.repair import Refiner
from pared.fitting.search.evaluate import Score
from pared.fitting.search.search import Judge, search
from pared.fitting.search.workspace import Workspace
from pared.runtime import saving
from pared.runtime.record import record_of
from tests.fitting import workspace_child
from tests.fitting.fakes import Probe, Synthetic, damage_of
from tests.fitting.workspace_child import FINGERPRINT

ROOT = Path(__file__).parents[2]
TRIAL = Trial(1e-9, 1e-3, 25_000, 0.5, 0.25, False, 1.5, 0.01, Confirmation(0.4, 1.0, 0.6, 0.02))


def outcome_of(model: nn.Module) -> Outcome:
    return record_of(model).outcome


def timeless(outcome: Outcome) -> Outcome:
    return replace(outcome, trials=tuple(replace(trial, seconds=0.0) for trial in outcome.trials))


def child(workspace: Path, log: Path, fatal: int) -> int:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    command = [sys.executable, "-m", "tests.fitting.workspace_child", str(workspace), str(log), str(fatal)]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.child
def test_a_search_killed_in_its_third_evaluation_loses_that_one_alone(tmp_path: Path) -> None:
    reference = workspace_child.run(None, tmp_path / "reference.log")
    calls = (tmp_path / "reference.log").read_text().splitlines()
    assert len(calls) > 3, "the search is long enough to be killed in the middle"

    assert child(tmp_path / "work", tmp_path / "first.log", fatal=3) == -9
    assert (tmp_path / "first.log").read_text().splitlines() == calls[:3]
    assert child(tmp_path / "work", tmp_path / "second.log", fatal=0) == 0
    assert (tmp_path / "second.log").read_text().splitlines() == calls[2:], "baseline and first trial are not repeated"

    saving.save(reference, tmp_path / "plain")
    resumed, plain = (directory / "best_model.pt" for directory in (tmp_path / "work/result", tmp_path / "plain"))
    assert resumed.read_bytes() == plain.read_bytes()


def test_a_finished_search_is_repeated_without_a_call_or_a_build(tmp_path: Path) -> None:
    first = workspace_child.run(Workspace(tmp_path / "work", FINGERPRINT), tmp_path / "first.log")
    compressor = Synthetic()

    def never(model: nn.Module) -> float:
        raise AssertionError("everything is known")

    judge = Judge(AccuracyCriterion(tolerable_loss=0.01), never)
    again = search(compressor, judge, workspace=Workspace(tmp_path / "work", FINGERPRINT))
    assert compressor.built == []
    assert outcome_of(again) == outcome_of(first)
    files = [pared.save(model, tmp_path / name) for model, name in ((first, "a"), (again, "b"))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_workspace_changes_nothing_of_the_result(tmp_path: Path) -> None:
    plain = workspace_child.run(None, tmp_path / "a.log")
    kept = workspace_child.run(Workspace(tmp_path / "work", FINGERPRINT), tmp_path / "b.log")
    assert timeless(outcome_of(kept)) == timeless(outcome_of(plain))


@pytest.mark.slow
@pytest.mark.parametrize("edited", [False, True])
def test_what_was_measured_before_a_search_is_measured_once(
    edited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), [torch.randn(4, 8)]
    made: list[Refiner[nn.Module]] = []
    repaired = Refiner.repaired

    def counted(refiner: Refiner[nn.Module], *args: Any, **options: Any) -> Any:
        made.append(refiner)
        return repaired(refiner, *args, **options)

    monkeypatch.setattr(Refiner, "repaired", counted)
    results = []
    for _ in range(2):
        conf = PostTrainingQuantConfig(max_trials=2)
        q = pared.fit(model, conf, x, lambda one: 1.0, workspace=tmp_path / "work", quiet=True)
        results.append(pared.save(q, tmp_path / "saved").read_bytes())
        if edited:
            place = tmp_path / "work" / "corrections.json"
            place.write_text(json.dumps(json.loads(place.read_text()) | {"inputs": 0.5}))
    assert results[0] == results[1]
    assert len(made) == (2 if edited else 1)
    assert ("corrections.json was changed or is from elsewhere" in caplog.text) == edited


def test_every_trial_can_be_loaded(tmp_path: Path) -> None:
    model = workspace_child.run(Workspace(tmp_path, FINGERPRINT), tmp_path / "calls.log")
    for number, trial in enumerate(outcome_of(model).trials, 1):
        loaded = pared.load(tmp_path / f"trial-{number}", model=Probe())
        assert damage_of(loaded) == trial.damage
        assert outcome_of(loaded).score == trial.score
        assert ("NOT met" in pared.report(loaded)) != trial.met


def test_max_trials_counts_earlier_ones(tmp_path: Path) -> None:
    for allowed in (1, 1, 2):
        judge = Judge(AccuracyCriterion(), lambda model: 1 - damage_of(model) * 1e4, max_trials=allowed)
        model = search(Synthetic(), judge, workspace=Workspace(tmp_path, FINGERPRINT))
        assert len(outcome_of(model).trials) == allowed


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    asked: list[float] = []

    def score(model: nn.Module) -> float:
        asked.append(damage_of(model))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return 1 - asked[-1] * 1e3

    judge = Judge(AccuracyCriterion(), score)
    first = search(Synthetic(), judge, workspace=Workspace(tmp_path, FINGERPRINT))
    second = search(Synthetic(), judge, workspace=Workspace(tmp_path, FINGERPRINT))
    assert [outcome_of(model).met for model in (first, second)] == [False, True]
    assert len(set(asked)) == len(asked) - 1, "only the interrupted evaluation is repeated"


def test_both_functions_have_their_baseline(tmp_path: Path) -> None:
    calls = []

    def confirming(model: nn.Module) -> float:
        calls.append(damage_of(model))
        return 1.0

    for _ in range(2):
        judge = Judge(AccuracyCriterion(), lambda model: 1.0, confirming, max_trials=2)
        search(Synthetic(), judge, workspace=Workspace(tmp_path, FINGERPRINT))
    assert calls.count(0.0) == 1


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, FINGERPRINT)
    samples = np.random.default_rng(0).normal(size=1000)
    workspace.set_baseline("eval_func", Score(0.1, samples))
    workspace.set_baseline("confirm_func", Score(1 / 3))
    workspace.add(TRIAL, partial(saving.save, Synthetic().build(Synthetic().at_damage(1e-3))))
    again = Workspace(tmp_path, FINGERPRINT)
    assert again.trials == (TRIAL,)
    found = again.baseline("eval_func")
    assert found is not None
    assert found.samples is not None
    assert np.array_equal(found.samples, samples)
    other = again.baseline("confirm_func")
    assert other is not None
    assert (other.value, other.samples) == (1 / 3, None)
    assert again.baseline("other") is None


@pytest.mark.parametrize("torn", [b"", b"{", b'{"price": 1e-9, "damage"', b"\xff"])
def test_a_torn_last_line_is_no_error(tmp_path: Path, torn: bytes) -> None:
    model = Synthetic().build(Synthetic().at_damage(1e-3))
    Workspace(tmp_path, FINGERPRINT).add(TRIAL, partial(saving.save, model))
    with (tmp_path / "trials.jsonl").open("ab") as file:
        file.write(torn)
    workspace = Workspace(tmp_path, FINGERPRINT)
    assert workspace.trials == (TRIAL,)
    workspace.add(TRIAL, partial(saving.save, model))
    assert Workspace(tmp_path, FINGERPRINT).trials == (TRIAL, TRIAL), "the next line does not grow onto the torn one"


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"model": "other", "tolerable_loss": "0.01"}, "model was 'checksum' and is 'other'"),
        ({"model": "checksum"}, "tolerable_loss was '0.01' and is not recorded"),
        ({**FINGERPRINT, "seed": "0"}, "seed was not recorded and is '0'"),
        ({**FINGERPRINT, "model": "x" * 99}, "model was 'checksum' and is '" + "x" * 57 + "...'"),
    ],
)
def test_the_workspace_of_another_search_is_refused(tmp_path: Path, now: dict[str, str], words: str) -> None:
    Workspace(tmp_path, FINGERPRINT)
    with pytest.raises(ConfigError) as error:
        Workspace(tmp_path, now)
    assert str(error.value) == (
        f"{tmp_path}: belongs to another search: {words}\n"
        "  Delete the workspace to start again, or pass another directory."
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("fingerprint.json", "{"),
        ("fingerprint.json", "[]"),
        ("baseline.json", "7"),
        ("trials.jsonl", "{}\n"),
        ("trials.jsonl", "[]\n"),
        ("trials.jsonl", "{\n" + json.dumps({}) + "\n"),
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, name: str, content: str) -> None:
    Workspace(tmp_path, FINGERPRINT)
    (tmp_path / name).write_text(content)
    with pytest.raises(FileError, match=f"{name}: cannot be read") as error:
        Workspace(tmp_path, FINGERPRINT)
    assert "Delete the workspace to start again" in str(error.value)


@pytest.mark.parametrize("baseline", [{"value": 1}, {"value": "x", "samples": None}, 3, {"value": 1, "samples": "x"}])
def test_a_damaged_baseline_is_refused(tmp_path: Path, baseline: object) -> None:
    (tmp_path / "baseline.json").write_text(json.dumps({"eval_func": baseline}))
    with pytest.raises(FileError, match="baseline.json: cannot be read"):
        Workspace(tmp_path, FINGERPRINT).baseline("eval_func")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        Workspace(tmp_path / "file" / "work", FINGERPRINT)


@pytest.mark.slow
def test_rules_are_told_apart_by_what_they_do(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16)), torch.randn(4, 8)

    def search_with(shape: tuple[int, int]) -> nn.Module:
        conf = PostTrainingQuantConfig(rules=[Rule(lambda given: given == shape, keep=True)], max_trials=1)
        return pared.fit(model, conf, [x], lambda q: float(q(x).detach().sum()), workspace=tmp_path / "work")

    search_with((8, 8))
    search_with((8, 8))
    with pytest.raises(ConfigError, match="another"):
        search_with((16, 8))
