"""The workspace: the records of a search, in a directory that outlives a killed process."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from pared.artifact.envelope import find_artifact
from pared.artifact.outcome import Trial
from pared.errors import ConfigError, FileError
from pared.files.disk import make_directory, reading, write_atomic, writing_to
from pared.fitting.calibration.observe import Statistics
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.rounding.plan import make_plan
from pared.fitting.search.evaluate import Score
from pared.model import storage
from pared.model.tensors import ModelTensors, ModuleT, find_tensors
from pared.runtime import quantized
from pared.runtime.layers.table import weights_of
from pared.runtime.profile import profile_beside
from pared.version import __version__

log = logging.getLogger(__name__)

_FINGERPRINT: Final = "fingerprint.json"
_BASELINE: Final = "baseline.json"
_TRIALS: Final = "trials.jsonl"
_START_AGAIN: Final = "Delete the workspace to start again, or pass another directory."
_VALUE_LENGTH: Final = 60  # characters of a fingerprint's value that an error shows


class Workspace:
    """The records of one search. Each is on the disk before the next step begins.

    The directory holds `fingerprint.json`, `baseline.json`, `trials.jsonl` (a line for each finished trial), and
    `trial-1`, `trial-2`, ...: what `save` writes, so that the model of each trial can be loaded.

    Args:
        directory: created if it is missing; an earlier search in it is continued.
        fingerprint: what the search depends on, as text: checksum of the model, configuration, versions. The user's
            functions are not part of it, because functions cannot be compared: use a workspace for one `eval_func`.

    Raises:
        ConfigError: the directory belongs to a search with another fingerprint.
        FileError: it cannot be read or written, or its records are damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     Workspace(directory, {"seed": "0"}).set_baseline("eval_func", Score(0.5))
    ...     Workspace(directory, {"seed": "0"}).baseline("eval_func").value
    0.5
    """

    def __init__(self, directory: str | Path, fingerprint: Mapping[str, str]) -> None:
        self._directory = Path(directory)
        make_directory(self._directory)
        self._check(dict(fingerprint))
        self._baselines: dict[str, Any] = self._read(_BASELINE) or {}
        self._trials = self._read_trials()
        if self._trials:
            log.info("%s: %d trials of an earlier run are used again", directory, len(self._trials))

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The finished trials, in order."""
        return tuple(self._trials)

    def baseline(self, name: str) -> Score | None:
        """The float model's recorded score; None if there is none yet.

        Args:
            name: the name of the function that scored it: "eval_func" or "confirm_func".

        Raises:
            FileError: the record is damaged.
        """
        data = self._baselines.get(name)
        if data is None:
            return None
        try:
            samples = None if data["samples"] is None else np.array(data["samples"], dtype=np.float64)
            return Score(float(data["value"]), samples)
        except (TypeError, KeyError, ValueError) as error:
            raise _damaged(self._directory / _BASELINE, error) from error

    def set_baseline(self, name: str, score: Score) -> None:
        """Record the float model's score; `name` is that of the function."""
        samples = None if score.samples is None else score.samples.tolist()
        self._baselines = {**self._baselines, name: {"value": score.value, "samples": samples}}
        self._write(_BASELINE, self._baselines)

    def add(self, trial: Trial, model: nn.Module) -> None:
        """Record a finished trial and its model; the trial counts once its line is complete.

        Raises:
            FileError: the directory cannot be written.
        """
        quantized.save(model, self._place(len(self._trials)))
        line = json.dumps(asdict(trial)) + "\n"
        with writing_to(self._directory), (self._directory / _TRIALS).open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._trials.append(trial)

    def model(self, number: int, skeleton: ModuleT) -> ModuleT:
        """The model of a finished trial, read from its file.

        Args:
            number: the trial's number, counted from 0.
            skeleton: a model of the same architecture, which gives structure and class.

        Raises:
            FileError, CorruptError: the file is missing or damaged.
        """
        file = find_artifact(self._place(number))
        return quantized.assemble(find_tensors(skeleton), storage.read(file), profile_beside(file))

    def _place(self, number: int) -> Path:
        return self._directory / f"trial-{number + 1}"

    def _check(self, fingerprint: dict[str, str]) -> None:
        recorded = self._read(_FINGERPRINT)
        if recorded is None:
            self._write(_FINGERPRINT, fingerprint)
            return
        for field in dict.fromkeys([*fingerprint, *recorded]):
            then, now = recorded.get(field), fingerprint.get(field)
            if then != now:
                raise ConfigError(
                    f"belongs to another search: {field} was {_short(then)} and is {_short(now)}",
                    where=str(self._directory),
                    remedy=_START_AGAIN,
                )

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._directory / name
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(path, error) from error
        if not isinstance(data, dict):
            raise _damaged(path, "it is not a JSON object")
        return data

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        write_atomic(self._directory / name, lambda file: file.write(json.dumps(data, indent=1).encode()))

    def _read_trials(self) -> list[Trial]:
        """The complete lines. An incomplete last one is cut off, so that the next line is not appended to it."""
        path = self._directory / _TRIALS
        if not path.is_file():
            return []
        with reading(path):
            data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if complete != data:
            log.info("%s: the last line is incomplete; its trial is made again", path)
            write_atomic(path, lambda file: file.write(complete))
        try:
            return [Trial.from_json(json.loads(line)) for line in complete.splitlines()]
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, error) from error


def _short(value: str | None) -> str:
    """A value of the fingerprint, short enough for one line of an error."""
    if value is None:
        return "not recorded"
    return repr(value if len(value) <= _VALUE_LENGTH else value[: _VALUE_LENGTH - 3] + "...")


def _damaged(path: Path, why: object) -> FileError:
    return FileError(f"cannot be read ({why})", where=str(path), remedy=_START_AGAIN)


def fingerprint(
    tensors: ModelTensors[nn.Module], conf: PostTrainingQuantConfig, seen: Statistics | None
) -> dict[str, str]:
    """What a search depends on, as far as it can be told: the user's functions cannot.

    Args:
        tensors: those of the float model.
        conf: what is wanted.
        seen: what calibration saw.
    """
    # Rules and registered layers are told by what comes of them, as their functions cannot be compared.
    decisions = make_plan(tensors, conf.rules, bits=None, strict=conf.strict)
    decided = [(d.name, d.treatment, d.bits, t.view.rows) for d, t in zip(decisions, tensors, strict=True)]
    int8 = [(name, weights_of(module)) for name, module in tensors.model.named_modules()]
    return {
        "pared": __version__,
        "torch": str(torch.__version__),
        "model": checksum(tensor.tensor for tensor in tensors),
        "calibration": checksum(tree_leaves([(c.args, dict(c.kwargs)) for c in seen.calls]) if seen else ()),
        "configuration": repr(replace(conf, max_trials=1, timeout=0, rules=())),
        "decisions": checksum([decided, int8]),
    }


def checksum(values: Iterable[object]) -> str:
    """A CRC-32 as eight hexadecimal digits: of tensors' types, shapes and bytes, and of other values' `repr`."""
    total = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
            total = zlib.crc32(f"{value.dtype}{list(value.shape)}".encode() + data, total)
        else:
            total = zlib.crc32(repr(value).encode(), total)
    return f"{total:08x}"
