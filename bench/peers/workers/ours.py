"""pared, in plain PyTorch: no compiler, no other engine."""

from __future__ import annotations

from torch import nn

import pared
from bench.peers.peer import Peer, Task
from pared import PostTrainingQuantConfig

_ALL_SAMPLES = 10**6  # what a subject gives for calibration is read whole


class EightBits(Peer):
    settings = "`fit(quant_level=0)`"
    needs = "model class"

    def config(self, task: Task) -> PostTrainingQuantConfig:  # noqa: ARG002  # the other needs it
        return PostTrainingQuantConfig(quant_level=0, calibration_sampling_size=_ALL_SAMPLES)

    def compress(self, task: Task, prepared: nn.Module) -> nn.Module:
        return pared.fit(prepared, self.config(task), task.subject.calls(), quiet=True)

    def save(self, task: Task, compressed: nn.Module) -> None:
        pared.save(compressed, task.folder)

    def reload(self, task: Task) -> nn.Module:
        return pared.load(task.folder, model=task.subject.blank())


class AsSmall(EightBits):
    """No larger than the smallest of the others in the same run, with all files that are saved beside the weights."""

    settings = "`fit(max_size=...)`: that of the smallest file of the others, less 1 %"

    def config(self, task: Task) -> PostTrainingQuantConfig:
        if task.smallest is None:
            raise ValueError("No other tool has written a file in this run, so there is no size to match.")
        return PostTrainingQuantConfig(max_size=task.smallest * 99 // 100, calibration_sampling_size=_ALL_SAMPLES)


PEERS: dict[str, Peer] = {"pared": EightBits(), "pared-small": AsSmall()}
