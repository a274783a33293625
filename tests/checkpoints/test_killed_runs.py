"""A run that was killed goes on where it was, if what it left is sound and its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pared
from pared.checkpoints import compress
from pared.checkpoints.journal import FOLDER, Journal
from pared.errors import FileError
from tests.checkpoints.states import layers, saved

_CHILD = """
import os, signal, sys
from pared.checkpoints import compress, journal
left = int(sys.argv[3])
write = journal._write
def dying(file, piece):
    global left
    left -= 1
    if left < 0:
        write(file, bytes(memoryview(piece).cast("B")[:len(piece) // 2]))  # a part of it
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, piece)
journal._write = dying
compress.compress(sys.argv[1], sys.argv[2], **eval(sys.argv[4]))
"""


@pytest.mark.parametrize("writes", [0, 4, 7, 10, 11])
@pytest.mark.parametrize("options", [{"bits": 4.0}, {"max_size": 60_000}], ids=str)
@pytest.mark.child
def test_a_killed_run_goes_on(writes: int, options: dict[str, Any], tmp_path: Path) -> None:
    source = saved(layers(), tmp_path / "m.pt")
    whole = pared.compress(source, tmp_path / "whole", **options).read_bytes()
    arguments = [str(source), str(tmp_path / "out"), str(writes), repr(options)]
    child = subprocess.run([sys.executable, "-c", _CHILD, *arguments], check=False)
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "best_model.pt").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FOLDER]
    done = compress.run(source, tmp_path / "out", **options, quiet=True)
    assert done.path.read_bytes() == whole
    assert (done.resumed > 0) == (writes >= 5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["best_model.pt"]


def interrupted(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A run that ends after its last tensor."""
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pared.compress(source, output, **options)


def test_other_work_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = saved(layers(), tmp_path / "m.pt"), tmp_path / "out"
    interrupted(source, output, monkeypatch)
    assert compress.run(source, output, quiet=True).resumed == 6
    interrupted(source, output, monkeypatch)
    assert compress.run(source, output, bits=4, quiet=True).resumed == 0
    interrupted(source, output, monkeypatch)
    saved(layers(), source)
    os.utime(source, ns=(1, 1))
    assert compress.run(source, output, quiet=True).resumed == 0


@pytest.mark.parametrize("place", ["journal.jsonl", "data"])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.99])
def test_a_damaged_journal_is_not_believed(
    place: str, where: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = saved(layers(), tmp_path / "m.pt"), tmp_path / "out"
    whole = pared.compress(source, tmp_path / "whole").read_bytes()
    interrupted(source, output, monkeypatch)
    file = output / FOLDER / place
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 0xFF
    file.write_bytes(content)
    done = compress.run(source, output, quiet=True)
    assert done.path.read_bytes() == whole
    assert done.resumed < 6


PLANS: tuple[Any, ...] = (3, [], {}, {"round": 1}, {"round": "1", "level": 1.0}, {"round": 1, "level": 1e300})


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_plan_that_makes_no_sense_is_made_again(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = saved(layers(), tmp_path / "m.pt"), tmp_path / "out"
    whole = pared.compress(source, tmp_path / "whole", max_size=60_000).read_bytes()
    interrupted(source, output, monkeypatch, max_size=60_000)
    head, *lines = (output / FOLDER / "journal.jsonl").read_bytes().splitlines(keepends=True)
    head = json.dumps(json.loads(head) | {"plan": plan}).encode() + b"\n"
    (output / FOLDER / "journal.jsonl").write_bytes(b"".join([head, *lines]))
    assert pared.compress(source, output, max_size=60_000).read_bytes() == whole


def test_a_journal_of_other_tensors_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = saved(layers(), tmp_path / "m.pt"), tmp_path / "out"
    whole = pared.compress(source, tmp_path / "whole").read_bytes()
    interrupted(source, output, monkeypatch)
    head, first, *_ = (output / FOLDER / "journal.jsonl").read_bytes().splitlines(keepends=True)
    first = json.dumps(json.loads(first) | {"name": "other"}).encode() + b"\n"
    (output / FOLDER / "journal.jsonl").write_bytes(head + first)
    assert pared.compress(source, output).read_bytes() == whole


def test_two_runs_do_not_write_to_one_place(tmp_path: Path) -> None:
    source = saved(layers(), tmp_path / "m.pt")
    with Journal(tmp_path / "out", {}), pytest.raises(FileError, match="out: this very run writes to this directory"):
        pared.compress(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    pared.compress(source, tmp_path / "out")
