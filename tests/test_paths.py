"""Whatever is wrong with a path or with what is there, an error of the family says so."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import pared
from pared.cli import app
from pared.errors import ConfigError, FileError, ParedError
from pared.files.disk import write_atomic
from pared.fitting.search.evaluate import Score
from pared.fitting.search.workspace import Workspace
from pared.runtime.profile.profile import profile_beside, this_machine

Verb = Callable[[Any, Path], object]


def net() -> nn.Linear:
    return nn.Linear(8, 8)


SMALL = pared.fit(net(), quiet=True)
SCORE: Callable[[nn.Module], float] = lambda _: 1.0  # noqa: E731  # a value of the table below

READS: dict[str, Verb] = {
    "load": lambda path, _: pared.load(path, model=net()),
    "load in another engine": lambda path, _: pared.load(path, engine="onnxruntime"),
    "load in the fastest engine": lambda path, _: pared.load(path, engine="auto"),
    "tune_speed": lambda path, _: pared.tune_speed(path, net(), [torch.ones(1, 8)]),
    "inspect": lambda path, _: pared.inspect(path),
    "inspect quickly": lambda path, _: pared.inspect(path, depth="quick"),
    "compare a": lambda path, _: pared.compare(path, net()),
    "compare b": lambda path, _: pared.compare(net(), path),
    "compress": lambda path, free: pared.compress(path, free),
    "expand": lambda path, free: pared.expand(path, free),
}
WRITES: dict[str, Verb] = {
    "save": lambda path, _: pared.save(SMALL, path),
    "export": lambda path, _: pared.export(SMALL, path, torch.ones(2, 8)),
    "report": lambda path, _: pared.report(SMALL, html=path),
    "compress to": lambda path, free: pared.compress(source(free), path),
    "expand to": lambda path, free: pared.expand(pared.save(SMALL, free / "small"), path),
    "fit": lambda path, _: pared.fit(net(), eval_func=SCORE, workspace=path, quiet=True),
}
COMMANDS: dict[str, Verb] = {
    " ".join(words): lambda path, free, words=words: command(words, path, free)  # type: ignore[misc]  # bound now
    for words in (
        ["inspect", "PATH"],
        ["inspect", "PATH", "--html", "FREE/page.html"],
        ["inspect", "SOURCE", "--html", "PATH"],
        ["compare", "PATH", "SOURCE"],
        ["compare", "SOURCE", "PATH"],
        ["compress", "PATH", "-o", "FREE/out"],
        ["compress", "SOURCE", "-o", "PATH"],
        ["expand", "PATH", "-o", "FREE/out"],
        ["fit", "tests.test_paths:net", "-o", "PATH", "-q"],
        ["tune-speed", "PATH", "--model", "tests.test_paths:net", "--calib", "tests.test_paths:net"],
    )
}


def source(free: Path) -> Path:
    torch.save(net().state_dict(), free / "source.pt")
    return free / "source.pt"


def command(words: list[str], path: Any, free: Path) -> None:
    places = {"PATH": str(path), "SOURCE": str(source(free))}
    (free / "page.html").write_text("")
    found = CliRunner().invoke(app, [places.get(word, word.replace("FREE", str(free))) for word in words])
    if found.exception is not None:
        raise found.exception


def circle(folder: Path) -> Path:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a"


def broken(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "gone")
    return folder / "link"


def deep(folder: Path) -> Path:
    """Folders within folders."""
    top = folder
    for _ in range(100):
        folder = folder / "d"
        folder.mkdir()
    torch.save(net().state_dict(), folder / "model.pt")
    return top


def empty_file(folder: Path) -> Path:
    (folder / "empty").touch()
    return folder / "empty"


def text(folder: Path) -> Path:
    (folder / "file").write_bytes(b"\xff\xfe no model \x00")
    return folder / "file"


# What the system refuses, whoever asks for it.
REFUSED: dict[str, Callable[[Path], Any]] = {
    "a NUL in it": lambda folder: folder / "a\0b",
    "a name that is too long": lambda folder: folder / ("x" * 300),
    "a path that is too long": lambda folder: folder.joinpath(*["x" * 200] * 30),
    "links in a circle": circle,
    "a name that is no Unicode": lambda folder: folder / "\ud800",
    "below a file": lambda folder: text(folder) / "below",
    "far below a file": lambda folder: text(folder) / "far" / "below",
    "empty": lambda folder: "",
    "a surrogate escape": lambda folder: folder / os.fsdecode(b"\xff\x00"),
    "not a path": lambda folder: 3,
    "bytes": lambda folder: bytes(folder),
}
# What is there, and nothing that can be read.
UNREADABLE: dict[str, Callable[[Path], Any]] = {
    "missing": lambda folder: folder / "missing",
    "a broken link": broken,
    "an empty file": empty_file,
    "an empty folder": lambda folder: folder,
    "no Unicode": text,
    "a device": lambda folder: Path("/dev/zero"),
    "nested without end": deep,
}
NOT_ON_A_COMMAND_LINE = (
    "a NUL in it",
    "a surrogate escape",
    "a name that is no Unicode",
    "not a path",
    "bytes",
    "empty",
)
TABLE = [
    *[(verb, path) for verb in READS for path in (REFUSED | UNREADABLE)],
    *[(verb, path) for verb in WRITES for path in REFUSED],
    *[(verb, path) for verb in COMMANDS for path in REFUSED if path not in NOT_ON_A_COMMAND_LINE],
]


@pytest.mark.skipif(sys.platform == "win32", reason="links and devices")
@pytest.mark.parametrize(("verb", "path"), TABLE, ids=lambda value: value)
def test_every_verb_tells_what_is_wrong_with_a_path(verb: str, path: str, tmp_path: Path) -> None:
    (tmp_path / "free").mkdir()
    (tmp_path / "place").mkdir()
    given = (REFUSED | UNREADABLE)[path](tmp_path / "place")
    with pytest.raises(ParedError) as error:
        (READS | WRITES | COMMANDS)[verb](given, tmp_path / "free")
    assert isinstance(error.value, FileError | ConfigError)


# --- paths of others


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
@pytest.mark.child
def test_what_belongs_to_another_is_told() -> None:
    """In a child that gives up being root, if it is: root may read everything."""
    code = "import sys; from tests import paths_child; paths_child.main(sys.argv[1])"
    with tempfile.TemporaryDirectory() as place:  # not of pytest, whose folders only their owner may enter
        found = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True, check=False)
        for folder in ("closed", "inner/closed", "listed"):
            Path(place, folder).chmod(0o755)
    assert found.stdout.splitlines() == ["done"], found.stdout + found.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.slow
@pytest.mark.child
def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path: Path) -> None:
    code = "import sys; from tests import full_disk_child; full_disk_child.main(sys.argv[1])"
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert found.stdout.splitlines() == ["done"], found.stdout + found.stderr


# --- files within a directory of ours


def unreadable(place: Path) -> None:
    """A regular file that is opened and cannot be read, even by root."""
    place.unlink(missing_ok=True)
    place.symlink_to("/proc/self/mem")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no Unicode": lambda place: place.write_bytes(b"\xff\xfe\n"),
    "no JSON": lambda place: place.write_bytes(b"{\n"),
    "nested without end": lambda place: place.write_bytes(b"[" * 200_000 + b"\n"),
    "another type": lambda place: place.write_bytes(b"3\n"),
    "cannot be read": unreadable,
}


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["fingerprint.json", "baseline.json", "trials.jsonl"])
def test_records_of_a_search_that_cannot_be_read(name: str, damage: str, tmp_path: Path) -> None:
    Workspace(tmp_path, {"seed": "0"}).set_baseline("eval_func", Score(0.5))
    DAMAGES[damage](tmp_path / name)
    with pytest.raises(FileError, match="cannot be read"):
        Workspace(tmp_path, {"seed": "0"})


@pytest.mark.parametrize("name", ["fingerprint.json", "baseline.json", "corrections.json", "trials.jsonl", "trial-1"])
def test_a_directory_or_file_in_place_of_records(name: str, tmp_path: Path) -> None:
    if name == "trial-1":
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(FileError):
        pared.fit(net(), None, [torch.ones(4, 8)], SCORE, workspace=tmp_path, quiet=True)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
@pytest.mark.parametrize("damage", DAMAGES)
def test_measured_times_that_cannot_be_read_are_none(damage: str, tmp_path: Path) -> None:
    path = pared.save(SMALL, tmp_path)
    DAMAGES[damage](tmp_path / "engine.json")
    assert profile_beside(path).machine == this_machine()
    assert pared.load(path, model=net()) is not None


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_journal_that_is_damaged_is_begun_again_or_told(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".pared-compress"
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(b"")
    (folder / "journal.jsonl").write_bytes(json.dumps({"depends": {}, "plan": {}}).encode())
    DAMAGES[damage](folder / "journal.jsonl")
    try:
        assert pared.compress(source(tmp_path), tmp_path / "out").is_file()
    except FileError:
        assert damage == "cannot be read"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes with names")
def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    """As root, a file would take the place of /dev/null as well."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileError, match="device or a pipe"):
        write_atomic(pipe, lambda file: file.write(b"1"))
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
