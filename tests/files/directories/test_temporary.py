"""What a killed process leaves half-written is cleared by the next that writes there; what a live one writes is not."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from pared.files import disk
from pared.files.directories import temporary
from pared.files.directories.temporary import clear, temporary_folder, temporary_name
from pared.files.disk import write_atomic

if sys.platform != "win32":
    import fcntl

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows deletes nothing that is open")

_KILLED = """
import os, signal, sys
from pathlib import Path
from pared.files.directories.temporary import temporary_folder
from pared.files.disk import write_atomic
def die(file):
    file.write(b"half"); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(b"1")
    write_atomic(Path(sys.argv[1]) / "file", die)
"""


@pytest.mark.child
def test_the_next_that_writes_clears_what_a_killed_process_has_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    child = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3, "the old file, half of a new one, and a folder"
    write_atomic(tmp_path / "other", lambda file: file.write(b"1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_what_is_still_being_written_stays(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"outer")
        with temporary_folder(tmp_path) as folder:
            (folder / "inner").touch()
            write_atomic(tmp_path / "second", lambda file: file.write(b"second"))
            assert (folder / "inner").exists()

    write_atomic(tmp_path / "first", write)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"first": b"outer", "second": b"second"}


@pytest.mark.parametrize("moment", ["before it is held", "while it is cleared"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_another_run_clears_before_it_is_held_is_made_again(
    kind: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = disk if kind == "file" else temporary
    keep, seen = module.keep, list[Path]()

    def raced(path: Path, descriptor: int) -> bool:
        seen.append(path)
        if len(seen) > 1:
            return keep(path, descriptor)
        other = os.open(path, os.O_RDONLY)  # what `clear` does, in two steps
        fcntl.flock(other, fcntl.LOCK_EX)
        if moment == "before it is held":
            path.rmdir() if kind == "folder" else path.unlink()
            os.close(other)
            return keep(path, descriptor)
        kept = keep(path, descriptor)
        path.rmdir() if kind == "folder" else path.unlink()
        os.close(other)
        return kept

    monkeypatch.setattr(module, "keep", raced)
    if kind == "file":
        write_atomic(tmp_path / "file", lambda file: file.write(b"whole"))
        assert (tmp_path / "file").read_bytes() == b"whole"
    else:
        with temporary_folder(tmp_path) as folder:
            (folder / "inner").write_bytes(b"whole")
    assert len(seen) == 2


def test_one_that_cannot_be_deleted_does_not_keep_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(4):
        (tmp_path / temporary_name()).write_bytes(b"")
    with socket.socket(socket.AF_UNIX) as other, pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.chdir(tmp_path)  # the name of a socket is short
        other.bind(kept := ".pared-00000000.tmp")  # no file: it cannot be opened
        clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [kept]
    assert f"{tmp_path / kept} cannot be deleted" in caplog.text


def test_only_what_is_ours_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"1")
    (tmp_path / temporary_name()).symlink_to(tmp_path / "target")
    for name in (
        ".pared-lock",
        ".pared-12345678.tmp.txt",
        ".pared-1234.tmp",
        "my.pared-12345678.tmp",
        ".pared-compress",
    ):
        (tmp_path / name).write_bytes(b"")
    before = sorted(tmp_path.iterdir())
    (tmp_path / temporary_name()).write_bytes(b"")
    clear(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_pipe_with_our_name_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / temporary_name())
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_removed_at_the_end_whatever_happens(tmp_path: Path) -> None:
    def interrupted() -> None:
        with temporary_folder(tmp_path) as folder:
            (folder / "deep").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
