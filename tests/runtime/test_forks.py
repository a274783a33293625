"""A process that has loaded a model may fork, as servers do that load before they start workers: children answer."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pared
from pared import PostTrainingQuantConfig
from pared.runtime.graphs.call_kinds import Argument
from pared.runtime.profile.profile import Profile
from pared.runtime.profile.timings import CallTiming, ModelTiming
from tests.runtime.fork_child import IDS, Encoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    calls = [torch.randint(0, 1000, IDS) for _ in range(2)]
    conf = PostTrainingQuantConfig(approach="dynamic", quant_level=0)
    model = pared.fit(Encoder().eval(), conf, calls, quiet=True)
    directory = tmp_path_factory.mktemp("saved")
    pared.save(model, directory)
    torch.save(model, directory / "model.pt")
    return directory


@pytest.mark.child
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("way", ["fast", "small", "in a thread", "pickled"])
def test_a_child_of_a_process_that_loaded_a_model_answers(way: str, saved: Path) -> None:
    command = [sys.executable, "-m", "tests.runtime.fork_child", way, str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "answers"


def prefer(saved: Path, form: str) -> None:
    """Rewrite the measured times so that a form is by far the fastest."""
    file = saved / "engine.json"
    profile = Profile.from_json(file.read_bytes())
    arguments = (Argument("ids", "int64", IDS),)
    times = {"graph_ms": None, "openvino_ms": None, form: 0.1}
    call = CallTiming(arguments, 10.0, None, 9.0, times["graph_ms"], "", times["openvino_ms"])
    file.write_text(replace(profile, model=ModelTiming((call,)), layers={}).to_json())


@pytest.mark.child
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("form", ["graph_ms", "openvino_ms"])
@pytest.mark.parametrize("way", ["fast", "cold", "other threads"])
def test_a_child_answers_in_every_form(way: str, form: str, saved: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(saved, tmp_path / "copied"))
    prefer(copied, form)
    test_a_child_of_a_process_that_loaded_a_model_answers(way, copied)


@pytest.mark.child
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_child_answers_where_nothing_was_measured(saved: Path) -> None:
    (saved / "engine.json").unlink()  # so that every layer runs in int8
    test_a_child_of_a_process_that_loaded_a_model_answers("fast", saved)
