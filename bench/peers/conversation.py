"""A worker, seen from the driver: a process that is asked and answers, within a time."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from pathlib import Path
from typing import Any

from bench import data
from bench.peers import environments
from bench.peers.families import Family

_BRIEF = 60.0  # seconds for a process to end by itself


class Conversation:
    """One peer with one model. After an answer that does not come, the process is dead and every request an error."""

    def __init__(
        self, family: Family, peer: str, subject: str, folder: Path, threads: int, *, log: str, smallest: int | None
    ) -> None:
        litter = folder.absolute() / "litter"  # tools leave files where they are started, and not all say so
        litter.mkdir(parents=True, exist_ok=True)
        command = [str(environments.python(family.environment)), "-m", "bench.peers.worker", family.module, peer]
        command += [subject, str(folder.absolute()), "--threads", str(threads)]
        command += [] if smallest is None else ["--smallest", str(smallest)]
        self._log = (folder / f"{log}.log").open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=litter,
            env={**environments.variables(family.environment, threads), data.VARIABLE: str(data.FOLDER.absolute())},
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def hear(self, seconds: float, at: str) -> dict[str, Any]:
        """The next answer."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self._process.kill()
            return {"error": f"no answer within {seconds:.0f} s", "at": at}
        if line is None:
            self._lines.put(None)
            return {"error": f"the process ended with code {self._process.wait()}", "at": at}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, seconds: float, do: str, **arguments: Any) -> dict[str, Any]:
        """An error is an answer with "error" and "at"."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"error": f"the process ended with code {self._process.wait()}", "at": do}
        return self.hear(seconds, do)

    def end(self) -> None:
        """The process ends with its input."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(_BRIEF)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._log.close()
