"""A process that has loaded a model may fork, as servers do that load before they start workers: children answer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pared
from pared import PostTrainingQuantConfig
from tests.runtime.fork_child import IDS, WAYS, Encoder


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
@pytest.mark.parametrize("way", WAYS)
def test_a_child_of_a_process_that_loaded_a_model_answers(way: str, saved: Path) -> None:
    command = [sys.executable, "-m", "tests.runtime.fork_child", way, str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "answers"


@pytest.mark.child
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_child_answers_where_nothing_was_measured(saved: Path) -> None:
    (saved / "engine.json").unlink()  # so that every layer runs in int8
    test_a_child_of_a_process_that_loaded_a_model_answers("fast", saved)
