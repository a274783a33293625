"""One peer with one model, in the peer's environment: answers requests, one JSON value a line, until its input ends.

What the tools print goes to standard error, which the driver keeps as a log.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.peers import subjects
from bench.peers.families import BASELINE
from bench.peers.peer import Peer, Task
from bench.peers.subjects.subject import Judgement
from bench.search import peak_memory

_PAUSE = 0.05  # seconds between engines in one process, whose threads may wait for work by spinning
_OUTPUTS, _SEEN = "outputs.pt", "seen.pt"
_RELOADED = 1e-3  # of the output's peak: more is another model


class Worker:
    """Args:
    folder: for the outputs on the timed inputs, for the process that reloads, and for what judges the model; beside it
        is that of FP32, which comes first.
    """

    def __init__(self, peer: Peer, task: Task, folder: Path) -> None:
        self.peer, self.task, self.folder = peer, task, folder
        self.shapes = task.subject.shapes()
        self._compressed: Any = None
        self.model: nn.Module
        self.reference: nn.Module

    def compress(self) -> dict[str, Any]:
        """Only once; the file is what was written, whatever it holds."""
        prepared = self.peer.prepare(self.task)
        before, start = peak_memory(), time.perf_counter()
        self._compressed = self.peer.compress(self.task, prepared)
        seconds, peak = time.perf_counter() - start, peak_memory()
        self.peer.save(self.task, self._compressed)
        nbytes = sum(file.stat().st_size for file in self.task.folder.rglob("*") if file.is_file())
        return {"seconds": seconds, "peak": peak, "peak_before": before, "bytes": nbytes}

    def judge(self) -> dict[str, Any]:
        """Of the model as it is after compression."""
        self.model = self.peer.module(self.task, self._compressed)
        self.reference = self.task.subject.load()
        torch.save({name: run(self.model).float() for name, run in self.shapes.items()}, self.folder / _OUTPUTS)
        seen = self.task.subject.watch(self.model)
        torch.save(seen, self.folder / _SEEN)
        found: Judgement = self.task.subject.judge(seen, torch.load(self.folder.parent / BASELINE / _SEEN))
        return {**asdict(found), "form": self.peer.form(self.task)}

    def reload(self) -> dict[str, Any]:
        """How far the outputs of what is read from the files are from those of the process that wrote them."""
        model, expected = self.peer.reload(self.task), torch.load(self.folder / _OUTPUTS)
        got = {name: run(model).float() for name, run in self.shapes.items()}
        off = max(float((got[name] - y).abs().max() / y.abs().max()) for name, y in expected.items())
        return {"off": off, "right": off <= _RELOADED}

    def time(self, shape: str, repeats: int) -> dict[str, list[float]]:
        """Milliseconds of a block of runs, then of as many of FP32."""
        run = self.shapes[shape]
        return {
            "ms": _block(lambda: run(self.model), repeats),
            "fp32_ms": _block(lambda: run(self.reference), repeats),
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """An error is an answer, too."""
        do = request.pop("do")
        handle: Callable[..., dict[str, Any]] = getattr(self, do)
        try:
            found = handle(**request)
        except Exception as error:  # noqa: BLE001  # whatever a tool raises is a row of the table
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            line = lines[0].replace(f"{self.folder}{os.sep}", "")  # which machine it was is nobody's business
            found = {"error": f"{type(error).__name__}: {line}", "at": do}
            traceback.print_exc(file=sys.stderr)
        said = {"settings": self.peer.settings, "needs": self.peer.needs}
        return {**found, **said, "notes": list(dict.fromkeys(self.task.notes))}


def _block(run: Callable[[], object], repeats: int) -> list[float]:
    time.sleep(_PAUSE)
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def versions() -> dict[str, str]:
    """Of the packages of this environment that have to do with its results."""
    wanted = (
        *("torch", "numpy", "transformers", "torchao", "optimum-quanto", "onnx", "onnxruntime", "onnxscript"),
        *("openvino", "nncf", "xllamacpp", "neural-compressor", "neural-compressor-pt"),
    )
    installed = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
    return {name: installed[name] for name in wanted if name in installed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("peer")
    parser.add_argument("subject", choices=subjects.NAMES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--smallest", type=int)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(options.threads)
    folders = [options.folder / name for name in ("files", "work")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    answers.write(json.dumps({"versions": versions()}) + "\n")
    answers.flush()
    worker: Worker | None = None
    for line in sys.stdin:
        with torch.no_grad():
            if worker is None:
                peer = importlib.import_module(f"bench.peers.workers.{options.module}").PEERS[options.peer]
                task = Task(subjects.find(options.subject), *folders, options.threads, options.smallest)
                worker = Worker(peer, task, options.folder)
            found = worker.answer(json.loads(line))
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
