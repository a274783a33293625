"""What a tool has to offer to be measured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.peers.subjects.subject import Part, Run, Subject


@dataclass(frozen=True)
class Task:
    """One model for one tool.

    Args:
        folder: what is saved; all files in it count.
        work: for files that do not, such as exported float graphs.
        threads: at work in the tool's own engine.
        smallest: the bytes of the smallest file of the tools before, or none.
        notes: what a reader has to know, such as a default that failed.
    """

    subject: Subject
    folder: Path
    work: Path
    threads: int
    smallest: int | None = None
    notes: list[str] = field(default_factory=list)


class Peer:
    """A tool with its settings. `needs`: what it takes to load its files, beside them."""

    settings = ""
    needs = "nothing"

    def prepare(self, task: Task) -> Any:
        """What compression starts from; not timed."""
        return task.subject.load()

    def compress(self, task: Task, prepared: Any) -> Any:
        """Calibration, search and conversion: timed."""
        raise NotImplementedError

    def save(self, task: Task, compressed: Any) -> None:
        """Write into `task.folder`."""
        torch.save(compressed.state_dict(), task.folder / "state.pt")

    def module(self, task: Task, compressed: Any) -> nn.Module:  # noqa: ARG002  # others need it
        """What the subject calls."""
        model: nn.Module = compressed
        return model

    def form(self, task: Task) -> str:  # noqa: ARG002  # others need it
        """Which form of the model answers, where there are several; after `save`."""
        return ""

    def reload(self, task: Task) -> nn.Module:
        """From `task.folder` alone, in a new process."""
        raise NotImplementedError


def loaded(model: nn.Module, task: Task) -> nn.Module:
    """A model with the state that the default `Peer.save` wrote."""
    model.load_state_dict(torch.load(task.folder / "state.pt", weights_only=False))  # classes of the tools' own
    return model.eval()


def call(model: nn.Module, inputs: Any) -> Any:
    """With one sample of a subject's calibration."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def run_of(part: Callable[..., Any]) -> Run:
    """A module that takes and gives tensors."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = part(*inputs)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    return run


def run_of_arrays(infer: Callable[[dict[str, Any]], list[Any]], names: tuple[str, ...]) -> Run:
    """An engine that takes numpy arrays by name and gives a list of them."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = infer({name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        return tuple(torch.from_numpy(np.asarray(y)) for y in outputs)

    return run


def dynamic_shapes(part: Part, *, named: bool = True) -> tuple[Any, ...]:
    """For `torch.export`: a dimension of one name is the same in all inputs; without names, whatever fits."""
    names = {name for axes in part.dynamic.values() for name in axes.values()}
    dims = {name: torch.export.Dim(name) if named else torch.export.Dim.AUTO for name in names}
    each = [{axis: dims[name] for axis, name in part.dynamic.get(i, {}).items()} for i in part.inputs]
    kinds = [parameter.kind for parameter in inspect.signature(part.module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(each)
    first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*each[:first], tuple(each[first:]))
