"""Windows that workers score have the same sums as those that are scored here, whatever dies meanwhile."""

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pared
from pared.cli import app
from pared.errors import ConfigError, EvaluationError
from pared.evaluation.shards import runs
from pared.executors.cluster import RayExecutor
from pared.executors.executor import Executor
from tests.evaluation.models import TEXT, folder_of
from tests.executors.clusters import processes
from tests.executors.pickled import Pickled
from tests.fitting.streamed.models import small, some_calls, written

IDS = torch.randint(96, (700,), generator=torch.Generator().manual_seed(0))
BATCHES = [dict(call.kwargs) for call in some_calls(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(small("Llama", layers=2), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def artifact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("small")
    conf = pared.PostTrainingQuantConfig(approach="weight_only", max_size="30kB")
    pared.fit(folder, conf, BATCHES, workspace=place / "work", output=place / "out", quiet=True)
    return place / "out"


@pytest.mark.slow
def test_tasks_find_the_same_sums(folder: Path, artifact: Path) -> None:
    executor = Pickled()
    found = pared.evaluate(artifact, IDS, folder, context=16, quiet=True, executor=executor)
    assert found == pared.evaluate(artifact, IDS, folder, context=16, quiet=True)
    assert found.kl
    assert len(executor.done) == 8
    assert {path.name for path in executor.checked} >= {"config.json", "model.safetensors", "best_model.safetensors"}


@pytest.mark.ray
@pytest.mark.child
@pytest.mark.usefixtures("one_thread")
def test_workers_find_the_same_sums_and_may_be_killed(two_nodes: Any, folder: Path, artifact: Path) -> None:
    here = pared.evaluate(artifact, IDS, folder, context=16, quiet=True)
    assert here.kl
    killed = []

    def kill() -> None:
        while not (working := processes("scoring windows")):
            time.sleep(0.001)
        working[0].send_signal(signal.SIGKILL)
        killed.append(working[0].pid)

    with RayExecutor(two_nodes.address) as workers:
        assert pared.evaluate(artifact, IDS, folder, context=16, quiet=True, executor=workers) == here
        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        assert pared.evaluate(artifact, IDS, folder, context=16, quiet=True, executor=workers) == here
        thread.join()
    assert killed


@pytest.mark.ray
@pytest.mark.child
@pytest.mark.usefixtures("one_thread")
def test_the_command_line_says_the_same(two_nodes: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", num_hidden_layers=1)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    arguments = ["evaluate", str(folder), "--text", str(text), "--context", "32", "--json"]
    found = CliRunner().invoke(app, [*arguments, "--workers", two_nodes.address])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == pared.evaluate(folder, text, context=32, quiet=True).to_json()


def test_what_workers_cannot_evaluate(folder: Path) -> None:
    workers = Pickled()
    with pytest.raises(EvaluationError, match="token 99 at position 1 is not among the 96 of the model"):
        pared.evaluate(folder, [1, 99, 3], quiet=True, executor=workers)
    with pytest.raises(ConfigError, match=r"with workers: the model is in the memory of this process\n  Pass the"):
        pared.evaluate(torch.nn.Linear(2, 2), [1, 2, 3], quiet=True, executor=workers)
    with pytest.raises(ConfigError, match="the reference is in the memory of this process"):
        pared.evaluate(folder, [1, 2, 3], torch.nn.Linear(2, 2), quiet=True, executor=workers)


def searched(folder: Path, at: Path, target: str, executor: Executor | None = None) -> dict[str, bytes]:
    """The weights of the smallest model that is good enough; the report says how long it took."""
    criterion = pared.AccuracyCriterion(criterion="absolute", tolerable_loss=0.05)
    conf = pared.PostTrainingQuantConfig(
        approach="weight_only", accuracy_criterion=criterion, max_trials=2, target=target
    )
    score = pared.text_score(IDS[:200], reference=folder, context=16)
    asked: dict[str, Any] = {"workspace": at / "work", "output": at / "out", "quiet": True, "executor": executor}
    pared.fit(folder, conf, BATCHES, score, **asked)
    assert not (at / "work" / "candidate").exists()
    return {path.name: path.read_bytes() for path in (at / "out").glob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["pared", "compressed-tensors"])
def test_a_search_has_its_models_scored(folder: Path, tmp_path: Path, target: str) -> None:
    here = searched(folder, tmp_path / "here", target)
    executor = Pickled()
    assert searched(folder, tmp_path / "there", target, executor) == here
    assert executor.done.count("scoring windows") == 7 * 3  # groups of two of 14 windows, of three models


@pytest.mark.ray
@pytest.mark.child
@pytest.mark.usefixtures("one_thread")
def test_a_search_scores_on_workers(
    two_nodes: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = searched(folder, tmp_path / "here", "pared")
    monkeypatch.setattr(runs, "_logits", None)  # which this process would call
    with RayExecutor(two_nodes.address) as workers:
        assert searched(folder, tmp_path / "there", "pared", workers) == here
