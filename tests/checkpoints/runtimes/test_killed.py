"""A run that was killed while it wrote for a runtime leaves nothing under the final name, and the next one works."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pared
from tests.checkpoints.runtimes.test_writing import checkpoint

pytestmark = pytest.mark.child

_CHILD = """
import os, signal, sys
from pathlib import Path
from pared.checkpoints import compress
from pared.checkpoints.runtimes import writing
left = int(sys.argv[3])
rounded = writing.rounded
def dying(*given):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rounded(*given)
writing.rounded = dying
compress.compress(sys.argv[1], sys.argv[2], target="mlx", bits=6)
"""


@pytest.mark.parametrize("tensors", [0, 9])
def test_a_killed_run_leaves_nothing_under_the_final_name(tensors: int, tmp_path: Path) -> None:
    checkpoint(tmp_path / "given")
    arguments = [str(tmp_path / "given"), str(tmp_path / "out"), str(tensors)]
    child = subprocess.run([sys.executable, "-c", _CHILD, *arguments], check=False)
    assert child.returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir() if path.name != "given")
    assert len(left) == 1
    assert left[0].startswith(".pared-")
    pared.compress(tmp_path / "given", tmp_path / "out", target="mlx", bits=6)
    pared.compress(tmp_path / "given", tmp_path / "whole", target="mlx", bits=6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "out", "whole"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
