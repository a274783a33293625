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
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import psutil
import torch

from bench.peers import environments, subjects, tables
from bench.peers.conversation import Conversation
from bench.peers.families import FAMILIES, FLOORS, OURS, Family
from bench.peers.rows import Row, Timing
from bench.run import OUT, THREADS, processor
from pared.runtime.kernels.machine import extensions

RESULTS = OUT / "peers.json"
FOLDER = OUT / "peers"
_START = 300.0  # seconds for a worker's imports
_BLOCK = 0.4  # seconds of runs at once
_REPEATS = (3, 40)
_ROUNDS = 7
_LEAST_FREE = 4 << 30  # bytes: with less, those that are alive are timed and ended before another starts


def wanted(names: list[str]) -> Iterator[tuple[Family, str]]:
    """Peers and their families: of the families or single peers that are named (none: all), and the floors."""
    for key, family in FAMILIES.items():
        for peer in family.peers:
            if not names or key in names or peer in names or peer in FLOORS:
                yield family, peer


class Field:
    """All peers of one model."""

    def __init__(self, subject: str, options: argparse.Namespace) -> None:
        self.subject, self.options = subject, options
        self.rows: list[Row] = []
        self.alive: list[tuple[Row, Conversation]] = []
        self.repeats: dict[str, int] = {}

    def run(self) -> list[Row]:
        for family, peer in wanted(self.options.peers):
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
            for _ in range(self.options.rounds):
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
    parser.add_argument("--peers", type=split, default=[], help="families or peers, separated by commas")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--repeats", type=int, help="runs in a block; as many as fit into a moment by default")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for any one answer")
    options = parser.parse_args()
    options.models = options.models or list(subjects.NAMES)
    assert set(options.models) <= set(subjects.NAMES), subjects.NAMES
    for environment in dict.fromkeys(family.environment for family, _ in wanted(options.peers)):
        install(environment)
    OUT.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        rows = Field(name, options).run()
        merged = {**known(), name: {"machine": machine(options.threads), "rows": [asdict(row) for row in rows]}}
        RESULTS.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
        show(rows)
    print(f"written: {RESULTS}; `make results-docs` puts the figures into the documents")


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
