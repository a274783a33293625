"""A run that was killed while any file was written goes on, and gives the same bytes."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pared.errors import ConfigError
from pared.fitting.config import PostTrainingQuantConfig, Rule
from pared.fitting.streamed.deciding.tracing import Tracing
from pared.fitting.streamed.fit import fit_folder
from pared.switches import threads
from tests.executors.pickled import Pickled
from tests.fitting.streamed.models import small, some_calls, written

pytestmark = [pytest.mark.child, pytest.mark.slow]


def run(folder: Path, at: Path, most: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fitting.streamed.fit_child"]
    return subprocess.run(
        [*command, str(folder), str(at / "work"), str(at / "out"), str(most)],
        check=False,
        capture_output=True,
        text=True,
    )


def test_killed_in_each_phase(tmp_path: Path) -> None:
    folder = written(small("Llama", layers=2), tmp_path / "model", dtype=torch.bfloat16)
    whole = run(folder, tmp_path / "whole", 10**9)
    assert whole.returncode == 0, whole.stderr
    files = int(whole.stdout)
    expected = (tmp_path / "whole" / "out" / "best_model.safetensors").read_bytes()
    at = tmp_path / "killed"
    killed = 0
    for most in (1, 3, files // 6, files // 4, files // 4, files // 2, 2):  # of what is left each time
        done = run(folder, at, most)
        killed += done.returncode == -9
    last = run(folder, at, 10**9)
    assert killed >= 5
    assert last.returncode == 0, last.stderr
    assert (at / "out" / "best_model.safetensors").read_bytes() == expected


def test_rules_with_functions_are_known_by_what_comes_of_them(tmp_path: Path) -> None:
    """Another process has other functions; and how long a search may take changes nothing."""
    folder = written(small("Llama", layers=2), tmp_path / "model")
    batches = [dict(call.kwargs) for call in some_calls(3)]

    def again(rows: int, **options: Any) -> None:
        rules = [Rule(lambda shape: len(shape) == 2 and shape[0] == rows, bits=6)]
        conf = PostTrainingQuantConfig(approach="weight_only", rules=rules, **options)
        fit_folder(folder, conf, batches, tmp_path / "work", tmp_path / "out", quiet=True)

    again(64)
    traced = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("traced-*")}
    again(64, max_trials=3, timeout=60.0)
    assert traced
    assert traced == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("traced-*")}
    with pytest.raises(ConfigError, match="belongs to another search: decisions"):
        again(32)


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    folder = written(small("Llama", layers=2), tmp_path / "model")
    conf = PostTrainingQuantConfig(approach="weight_only")
    batches = [dict(call.kwargs) for call in some_calls(3)]
    fit_folder(folder, conf, batches, tmp_path / "work", tmp_path / "out", quiet=True)
    other = written(small("Llama", tied=True, layers=2), tmp_path / "other")
    for changed, what in (
        ((other, conf, batches), "weights"),
        ((folder, PostTrainingQuantConfig(approach="weight_only", seed=1), batches), "options"),
        ((folder, conf, batches[:2]), "calibration"),
    ):
        with pytest.raises(ConfigError, match=f"belongs to another search: {what}"):
            fit_folder(*changed, tmp_path / "work", tmp_path / "out", quiet=True)


def test_threads_are_those_of_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(small("Llama", layers=2), tmp_path / "model")
    batches = [dict(call.kwargs) for call in some_calls(3)]
    seen = set()
    trace = Tracing.group

    def watched(self: Tracing, given: Any) -> Any:
        seen.add(torch.get_num_threads())
        return trace(self, given)

    def fitted(at: Path, executor: Pickled | None) -> bytes:
        asked: Any = tmp_path / "work", at
        conf = PostTrainingQuantConfig(approach="weight_only")
        return fit_folder(folder, conf, batches, *asked, quiet=True, executor=executor).path.read_bytes()

    watched.__name__ = "group"  # by which it is sent
    monkeypatch.setattr(Tracing, "group", watched)
    with threads(2):
        first = fitted(tmp_path / "first", Pickled(threads=1))
        assert seen == {1}
        fingerprint = (tmp_path / "work" / "fingerprint.json").read_bytes()
        shutil.rmtree(tmp_path / "work")
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "fingerprint.json").write_bytes(fingerprint)  # as if it had ended soon
        seen.clear()
        assert fitted(tmp_path / "second", None) == first  # with two threads of its own
        assert seen == {1}
        with pytest.raises(ConfigError, match=r"begun with 1 threads .* 2 now\n  Pass RayExecutor\(cores=1\)"):
            fitted(tmp_path / "third", Pickled(threads=2))
        assert torch.get_num_threads() == 2
