"""`make bench-peers`: size, score, fidelity, time and memory of models through every tool, as JSON in `out/bench`.

Each tool is a process of its own in an environment of its own (`environments.py`), and compresses while the others
rest. Then they are timed in turn, round after round: a block of runs, then as many of FP32 eager in the same process,
so that the ratio of the two does not depend on which process a machine was kinder to. A tool that fails is a row.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.peers import environments, first, subjects, tables
from bench.peers.conversation import Conversation
from bench.peers.families import CHOSEN, FLOORS, OURS, Family, wanted
from bench.peers.rows import Row, Timing
from bench.run import OUT, THREADS, processor
from pared.runtime.kernels.machine import extensions

RESULTS = OUT / "peers.json"
FOLDER = OUT / "peers"
_START = 300.0  # seconds for a worker's imports
_BLOCK = 0.3  # seconds of runs at once
_REPEATS = (1, 40)
_ROUNDS = 5
_LEAST_ROUNDS, _LONG = 3, 45.0  # a shape that has taken so many seconds gets no more rounds than these
# In bytes, what fitting SmolLM2 takes: with less, those that are alive are timed and ended before another starts.
_LEAST_FREE = 8 << 30


class Field:
    """All peers of one model."""

    def __init__(self, subject: str, options: argparse.Namespace) -> None:
        self.subject, self.options = subject, options
        self.rows: list[Row] = []
        self.alive: list[tuple[Row, Conversation]] = []
        self.repeats: dict[str, int] = {}

    def run(self) -> list[Row]:
        for family, peer in wanted(self.options.peers, self.subject):
            if psutil.virtual_memory().available < _LEAST_FREE:
                self.time()
            self.enter(family, peer)
        self.time()
        return self.rows

    def enter(self, family: Family, peer: str) -> None:
        """Compress, judge, reload; who has come so far will be timed."""
        row = Row(self.subject, peer)
        self.rows.append(row)
        print(f"{self.subject}: {peer} ...", flush=True)
        folder = FOLDER / self.subject / peer
        shutil.rmtree(folder, ignore_errors=True)
        try:
            worker = self.converse(family, peer, "compress")
        except subprocess.CalledProcessError as error:
            row.errors.append(f"install: pip ended with code {error.returncode}")
            return
        limit, start = self.options.timeout, time.monotonic()
        came = row.take(worker.hear(_START, "start"))
        came = came and row.take(worker.ask(limit, "compress")) and row.take(worker.ask(limit, "judge"))
        if came:
            if self.options.reload:
                self.reload(family, peer, row)
            self.alive.append((row, worker))
        else:
            worker.end()
        print(f"  {time.monotonic() - start:.0f} s", *row.errors, sep="\n  ", flush=True)

    def converse(self, family: Family, peer: str, log: str) -> Conversation:
        folder, threads = FOLDER / self.subject / peer, self.options.threads
        smallest = [row.bytes for row in self.rows if row.bytes and row.peer not in (*FLOORS, *OURS)]
        return Conversation(
            family, peer, self.subject, folder, threads, log=log, smallest=min(smallest) if smallest else None
        )

    def reload(self, family: Family, peer: str, row: Row) -> None:
        worker = self.converse(family, peer, "reload")
        if row.take(worker.hear(_START, "start")):
            row.take(worker.ask(self.options.timeout, "reload"))
        worker.end()

    def time(self) -> None:
        """All who are alive, in turn; then they end."""
        for shape in subjects.find(self.subject).shapes() if self.alive else ():
            start = time.monotonic()
            for number in range(self.options.rounds):
                if number >= _LEAST_ROUNDS and time.monotonic() - start > _LONG:
                    break
                for row, worker in self.alive:
                    if not any(error.startswith("time") for error in row.errors):
                        self.block(shape, row, worker)
        for _, worker in self.alive:
            worker.end()
        self.alive = []

    def block(self, shape: str, row: Row, worker: Conversation) -> None:
        if shape not in self.repeats:  # by the first peer, which is FP32
            once = worker.ask(self.options.timeout, "time", shape=shape, repeats=_REPEATS[0])
            if not row.take(once):
                return
            least, most = _REPEATS
            fits = _BLOCK / (statistics.median(once["fp32_ms"]) / 1e3)
            self.repeats[shape] = self.options.repeats or round(min(max(fits, least), most))
        answer = worker.ask(self.options.timeout, "time", shape=shape, repeats=self.repeats[shape])
        if row.take(answer):
            row.timings.setdefault(shape, Timing()).add(answer)


def machine(threads: int) -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "capability": " ".join([torch.backends.cpu.get_cpu_capability(), *extensions()]),
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": threads,
        "load": psutil.getloadavg()[0],
    }


def known() -> dict[str, Any]:
    return dict(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.is_file() else {}


def split(text: str) -> list[str]:
    return [name for name in text.replace(",", " ").split() if name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=split, default=list(subjects.NAMES), help="separated by commas")
    parser.add_argument(
        "--peers", type=split, default=[], help="families or peers, separated by commas; `all`; default: the usual ones"
    )
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--repeats", type=int, help="runs in a block; as many as fit into a moment by default")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for any one answer")
    parser.add_argument("--reload", action="store_true", help="also read each tool's files in a new process")
    options = parser.parse_args()
    options.models = options.models or list(subjects.NAMES)
    assert set(options.models) <= set(subjects.NAMES), subjects.NAMES
    families = [family for name in options.models for family, _ in wanted(options.peers, name)]
    for environment in dict.fromkeys(family.environment for family in families):
        install(environment)
    OUT.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        start, about = time.monotonic(), {"machine": machine(options.threads), "date": date.today().isoformat()}
        rows = Field(name, options).run()
        found = {**about, "rows": [asdict(row) for row in rows], **extras(name, options)}
        found["minutes"] = (time.monotonic() - start) / 60
        merged = {**known(), name: found}
        RESULTS.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
        show(rows)
    print(f"written: {RESULTS}; `make results-docs` puts the figures into the documents")


def extras(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What is measured of one model only: how long it takes from a new process to the first answer."""
    files = (FOLDER / name / CHOSEN / "files").absolute()
    if name != first.SUBJECT or not any(files.glob("*")):
        return {}
    return {"first": first_answers(files, options.threads, options.rounds)}


def first_answers(files: Path, threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each form in `first`, round by round, in turn, on a machine where each has run once.

    Modules are compiled then, as pip compiles those that it installs, and graphs are kept.
    """
    found: dict[str, list[float]] = {form: [] for form in first.FORMS}
    kept = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str((FOLDER / "pycache").absolute())}
    variables = {**environments.variables(environments.OWN, threads), **kept}
    for _ in range(1 + rounds):
        for form, seconds in found.items():
            command = [sys.executable, "-m", first.__name__, form, str(files), "--threads", str(threads)]
            said = subprocess.run(command, check=True, capture_output=True, text=True, env=variables).stdout
            seconds.append(json.loads(said.splitlines()[-1]))
    return {form: seconds[1:] for form, seconds in found.items()}


def install(environment: str) -> None:
    """Now, so that nothing is installed while anything is measured; what fails is told by each peer's row."""
    try:
        environments.python(environment)
    except subprocess.CalledProcessError as error:
        print(f"{environment}: {error}")


def show(rows: list[Row]) -> None:
    print(tables.table(rows))
    print(tables.remarks(rows))


if __name__ == "__main__":
    main()
