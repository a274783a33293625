"""The workspace: the records of a search, in a directory that outlives a killed process."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from pared.artifact.outcome import Trial
from pared.errors import FileError
from pared.files.directories.writable import writing_to
from pared.files.disk import make_directory, reading, write_atomic
from pared.fitting.calibration.observe import Statistics
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.records.fingerprint import claim, damaged, read_object
from pared.fitting.rounding.plan import make_plan
from pared.fitting.search.evaluate import Score
from pared.model.recorded import values
from pared.model.tensors import ModelTensors
from pared.runtime.layers.table import weights_of
from pared.version import __version__

log = logging.getLogger(__name__)

_BASELINE: Final = "baseline.json"
_TRIALS: Final = "trials.jsonl"
_FOLDER: Final = re.compile(r"trial-[1-9]\d{0,5}")
_CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class _Record:
    """A finished trial and its model, which are one: a trial counts only together with the very file it was about.

    Args:
        trial: the trial.
        folder: the name of the folder that holds its model.
        file: the name of the model's file in it.
        nbytes: the size of the model's file.
        sha256: the checksum of the model's file.
    """

    trial: Trial
    folder: str
    file: str
    nbytes: int
    sha256: str

    @classmethod
    def of(cls, trial: Trial, file: Path) -> _Record:
        """The record of a trial whose model has just been written."""
        return cls(trial, file.parent.name, file.name, file.stat().st_size, _sha256(file))

    def to_json(self) -> dict[str, Any]:
        """The record without its seal."""
        model = {"folder": self.folder, "file": self.file, "nbytes": self.nbytes, "sha256": self.sha256}
        return {**asdict(self.trial), "model": model}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> _Record | None:
        """The inverse of `to_json`; None if the model is not described. Raises TypeError for anything but a trial."""
        trial = Trial.from_json({key: value for key, value in data.items() if key not in ("model", "seal")})
        model = data.get("model")
        if not isinstance(model, dict) or not _FOLDER.fullmatch(str(model.get("folder"))):
            return None
        name = str(model.get("file"))
        if Path(name).name != name:
            return None
        return cls(trial, model["folder"], name, model.get("nbytes", -1), model.get("sha256", ""))

    def misfit(self, directory: Path) -> str:
        """Why the file in the folder is not the model of this trial; empty if it is."""
        try:
            file = directory / self.folder / self.file
            with reading(file):
                same = file.stat().st_size == self.nbytes and _sha256(file) == self.sha256
        except FileError as error:
            return error.what
        return "" if same else "its file is not the model that was evaluated"


class Workspace:
    """The records of one search. Each is on the disk before the next step begins.

    The directory holds `fingerprint.json`, `baseline.json`, `corrections.json` (what was measured before the first
    trial), `trials.jsonl` (a line for each finished trial), and `trial-1`, `trial-2`, ...: what `save` writes, so that
    the model of each trial can be read again. A seal on each record
    ties it to the search; whatever was edited, or copied from elsewhere, is left where it is and not used. One run at a
    time may use the directory: `fit` owns it as long as it runs.

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
        self._fingerprint = dict(fingerprint)
        make_directory(self._directory)
        claim(self._directory, self._fingerprint)
        self._baselines = self._read_baselines()
        self._folders: set[str] = set()  # that lines of the file name, be they used or not
        self._records = self._read_records()
        if self._records:
            log.info("%s: %d trials of an earlier run are used again", directory, len(self._records))

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The finished trials, in order."""
        return tuple(record.trial for record in self._records)

    def baseline(self, name: str) -> Score | None:
        """The float model's recorded score; None if there is none yet.

        Args:
            name: the name of the function that scored it: "eval_func" or "confirm_func".
        """
        return self._baselines.get(name)

    def set_baseline(self, name: str, score: Score) -> None:
        """Record the float model's score; `name` is that of the function."""
        self._baselines = {**self._baselines, name: score}
        self._write(_BASELINE, {name: self._sealed(_plain(score), name) for name, score in self._baselines.items()})

    def noted(self, name: str) -> dict[str, Any] | None:
        """What this search has noted under a name; None if there is nothing, or if it was changed since."""
        data = read_object(self._directory / f"{name}.json")
        if data is None:
            return None
        if not self._holds(data, name):
            log.warning("%s: %s.json was changed or is from elsewhere; it is measured again", self._directory, name)
            return None
        return {key: value for key, value in data.items() if key != "seal"}

    def note(self, name: str, data: Mapping[str, Any]) -> None:
        """Record JSON values under a name."""
        self._write(f"{name}.json", self._sealed(data, name))

    def add(self, trial: Trial, save: Callable[[Path], Path]) -> None:
        """Record a finished trial and its model; the trial counts once its line is complete.

        Args:
            trial: the trial.
            save: writes its model to a directory, and returns the file.

        Raises:
            FileError: the directory cannot be written. What is recorded already stays.
        """
        folder = f"trial-{1 + max((int(name.partition('-')[2]) for name in self._folders), default=0)}"
        file = save(self._directory / folder)
        with reading(file):
            record = _Record.of(trial, file)
        line = json.dumps(self._sealed(record.to_json(), *self._scores())) + "\n"
        with writing_to(self._directory):
            _append(self._directory / _TRIALS, line.encode())
        self._folders.add(folder)
        self._records.append(record)

    def file(self, number: int) -> Path:
        """The file of a finished trial's model, as it was saved.

        Args:
            number: the trial's number, counted from 0.

        Raises:
            FileError: the file is missing, or no longer the one that was evaluated.
        """
        record = self._records[number]
        if wrong := record.misfit(self._directory):
            raise FileError(
                f"cannot be used: {wrong}",
                where=str(self._directory / record.folder),
                remedy="Call fit again with this workspace: this trial is repeated, all others are used.",
            )
        return self._directory / record.folder / record.file

    def _sealed(self, data: Mapping[str, Any], *depends: object) -> dict[str, Any]:
        """A record with a checksum of itself, of this search, and of other values that it depends on."""
        text = json.dumps([self._fingerprint, data, depends], sort_keys=True)
        return {**data, "seal": hashlib.sha256(text.encode()).hexdigest()}

    def _holds(self, data: Mapping[str, Any], *depends: object) -> bool:
        """Whether a record has the seal that `_sealed` gave it."""
        return self._sealed({key: value for key, value in data.items() if key != "seal"}, *depends) == data

    def _scores(self) -> list[object]:
        """The float model's scores, by which a trial was judged."""
        return [[name, _plain(score)] for name, score in sorted(self._baselines.items())]

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        write_atomic(self._directory / name, lambda file: file.write(json.dumps(data, indent=1).encode()))

    def _read_baselines(self) -> dict[str, Score]:
        """The float model's scores that were recorded by this search."""
        found: dict[str, Score] = {}
        path = self._directory / _BASELINE
        for name, data in (read_object(path) or {}).items():
            try:
                score = _score(data)
            except (TypeError, KeyError, ValueError, OverflowError) as error:
                raise damaged(path, error) from error
            if self._holds(data, name):
                found[name] = score
            else:
                log.warning("%s: the score of %s was changed or is from elsewhere; it is measured again", path, name)
        return found

    def _read_records(self) -> list[_Record]:
        """The trials that can be trusted: each line is as it was written, and names a file that is as it was written.

        An incomplete last line is cut off, so that the next line is not appended to it.
        """
        path = self._directory / _TRIALS
        if not path.is_file():
            return []
        with reading(path):
            data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if complete != data:
            log.info("%s: the last line is incomplete; its trial is made again", path)
            write_atomic(path, lambda file: file.write(complete))
        found: list[_Record] = []
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                read = json.loads(line)
                record = _Record.from_json(read)
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise damaged(path, error) from error
            if wrong := self._misfit(read, record):
                log.warning("%s: line %d is not used, and its trial is made again if needed: %s", path, number, wrong)
            elif record is not None:
                found.append(record)
            self._folders |= set() if record is None else {record.folder}
        return found

    def _misfit(self, data: Mapping[str, Any], record: _Record | None) -> str:
        """Why a line cannot be trusted; empty if it can."""
        if record is None or not self._holds(data, *self._scores()):
            return "it was changed, or written by another search"
        if record.folder in self._folders:
            return f"another line is about {record.folder} as well"
        return record.misfit(self._directory)


def _append(path: Path, line: bytes) -> None:
    """Append a line that is on the disk when this returns; if it cannot be, nothing is left of it."""
    with path.open("ab", buffering=0) as file:  # with a buffer, closing the file would try again
        before = file.tell()
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            found.update(piece)
    return found.hexdigest()


def _plain(score: Score) -> dict[str, Any]:
    return {"value": score.value, "samples": None if score.samples is None else score.samples.tolist()}


def _score(data: Mapping[str, Any]) -> Score:
    samples = None if data["samples"] is None else np.array(data["samples"], dtype=np.float64)
    return Score(float(data["value"]), samples)


def fingerprint(
    tensors: ModelTensors[nn.Module],
    conf: PostTrainingQuantConfig,
    seen: Statistics | None,
    *,
    confirmed: bool = False,
) -> dict[str, str]:
    """What a search depends on, as far as it can be told: the user's functions cannot.

    Args:
        tensors: those of the float model.
        conf: what is wanted.
        seen: what calibration saw.
        confirmed: whether there is a `confirm_func`.
    """
    # Rules and registered layers are told by what comes of them, as their functions cannot be compared.
    decisions = make_plan(tensors, conf.rules, bits=None, strict=conf.strict)
    decided = [(d.name, d.treatment, d.bits, t.view.rows) for d, t in zip(decisions, tensors, strict=True)]
    int8 = [(name, weights_of(module)) for name, module in tensors.model.named_modules()]
    return {
        "pared": __version__,
        "torch": str(torch.__version__),
        "model": checksum(tensor.tensor for tensor in tensors),
        "calibration": checksum(told([(c.args, dict(c.kwargs)) for c in seen.calls]) if seen else ()),
        "configuration": repr(replace(conf, max_trials=1, timeout=0, rules=())),
        "decisions": checksum([decided, int8]),
        "confirm_func": "given" if confirmed else "none",
    }


def told(value: object) -> Iterator[object]:
    """The leaves of a value; of those whose `repr` is their address, only the class."""
    for _, leaf in values.leaves(value):
        yield type(leaf).__name__ if type(leaf).__repr__ is object.__repr__ else leaf


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
