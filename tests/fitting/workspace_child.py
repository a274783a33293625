"""A search in a process of its own, which may be killed in the middle of an evaluation: for `test_workspace.py`.

Arguments: the workspace, a file that gets a line for each call of `eval_func`, and the call during which to die.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
from torch import nn

from pared import AccuracyCriterion
from pared.fitting.search.search import Judge, search
from pared.fitting.search.workspace import Workspace
from pared.runtime import saving
from tests.fitting.fakes import Synthetic, damage_of

FINGERPRINT = {"model": "checksum", "tolerable_loss": "0.01"}


def run(workspace: Workspace | None, log: Path, fatal: int = 0) -> nn.Module:
    """Search with 40 scores of which each differs a little from the others, and log every call."""

    def score(model: nn.Module) -> np.ndarray:
        with log.open("a") as file:
            file.write(f"{damage_of(model)!r}\n")
        if len(log.read_text().splitlines()) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1 - 0.01 * (damage_of(model) / 3e-6) ** 0.7 * (1 + np.sin(np.arange(40)) / 9)

    judge = Judge(AccuracyCriterion(tolerable_loss=0.01), score)
    return search(Synthetic(), judge, workspace=workspace)


if __name__ == "__main__":
    model = run(Workspace(sys.argv[1], FINGERPRINT), Path(sys.argv[2]), int(sys.argv[3]))
    saving.save(model, Path(sys.argv[1]) / "result")
