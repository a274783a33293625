"""Intel Neural Compressor 2.6: static with its search, and dynamic."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from neural_compressor import PostTrainingQuantConfig, quantization
from neural_compressor.config import AccuracyCriterion, TuningCriterion
from neural_compressor.utils.pytorch import load
from torch import nn

from bench.peers.peer import Peer, Task

_TRIALS = 100
_UNPICKLE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # its load is older than Torch's default, and its files hold classes


class _Loader:
    """Batches with labels, which nobody reads."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls
        self.batch_size = max(map(_samples, calls))

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return ((call, 0) for call in self.calls)

    def __len__(self) -> int:
        return len(self.calls)


def _samples(call: Any) -> int:
    return len(next(iter(call.values())) if isinstance(call, dict) else call)


def _checked(model: Any) -> Any:
    if model is None:
        raise RuntimeError("fit returned None: no model met the criterion, or an error was swallowed")
    return model


class Static(Peer):
    settings = f"`approach='static'`, eval_func is the score, loss of 1 % relative, {_TRIALS} trials"
    needs = f"model class, `{_UNPICKLE}`"
    excluded: tuple[str, ...] = ()

    def prepare(self, task: Task) -> nn.Module:
        model = task.subject.load()
        self.expected = task.subject.watch(model)
        return model

    def compress(self, task: Task, prepared: nn.Module) -> Any:
        subject, calls = task.subject, task.subject.calls()
        if callable(calls):
            raise ValueError("It calibrates on batches, and decoding with a cache makes none.")
        conf = PostTrainingQuantConfig(
            approach="static",
            calibration_sampling_size=[sum(map(_samples, calls))],
            accuracy_criterion=AccuracyCriterion(subject.higher_is_better, "relative", 0.01),
            tuning_criterion=TuningCriterion(timeout=0, max_trials=_TRIALS),
            excluded_precisions=list(self.excluded),
        )
        return _checked(
            quantization.fit(
                prepared,
                conf,
                calib_dataloader=_Loader(calls),
                eval_func=lambda model: subject.judge(subject.watch(model), self.expected).score,
            )
        )

    def save(self, task: Task, compressed: Any) -> None:
        compressed.save(str(task.folder))

    def module(self, task: Task, compressed: Any) -> nn.Module:  # noqa: ARG002  # the signature of all peers
        model: nn.Module = compressed.model
        return model

    def reload(self, task: Task) -> nn.Module:
        os.environ[_UNPICKLE] = "1"
        model: nn.Module = load(str(task.folder), task.subject.blank())
        return model


class StaticWithoutBfloat16(Static):
    settings = f"{Static.settings}, `excluded_precisions=['bf16']`"
    excluded = ("bf16",)


class Dynamic(Static):
    settings = "`approach='dynamic'`"

    def prepare(self, task: Task) -> nn.Module:
        return task.subject.load()

    def compress(self, task: Task, prepared: nn.Module) -> Any:  # noqa: ARG002  # it takes no data
        return _checked(quantization.fit(prepared, PostTrainingQuantConfig(approach="dynamic")))


PEERS: dict[str, Peer] = {
    "inc2-static": Static(),
    "inc2-static-nobf16": StaticWithoutBfloat16(),
    "inc2-dynamic": Dynamic(),
}
