"""A directory has one owner: of this process, of another one, or of a thread."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pared.errors import FileError
from pared.files.directories.lock import LOCK, owned

REFUSED = ("another run writes to this directory", "this very run writes to this directory already")


def is_free(directory: Path) -> bool:
    try:
        with owned(directory):
            return True
    except FileError as error:
        return error.what not in REFUSED


def test_the_owner_is_alone_and_leaves_nothing(tmp_path: Path) -> None:
    with owned(tmp_path):
        assert not is_free(tmp_path)
    assert is_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_thread_is_another_run(tmp_path: Path) -> None:
    found: list[bool] = []
    with owned(tmp_path):
        thread = threading.Thread(target=lambda: found.append(is_free(tmp_path)))
        thread.start()
        thread.join()
    assert found == [False]


def test_the_owner_itself_does_not_wait_for_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with (
        owned(tmp_path),
        pytest.raises(FileError, match="this very run writes to this directory already") as error,
        owned(tmp_path / "link", wait=1e6),
    ):
        pass
    assert "Choose another directory" in error.value.remedy
    assert is_free(tmp_path)


def test_who_waits_comes_next(tmp_path: Path) -> None:
    order: list[str] = []
    begun = threading.Event()

    def second() -> None:
        begun.set()
        with owned(tmp_path, wait=30):
            order.append("second")

    thread = threading.Thread(target=second)
    with owned(tmp_path):
        thread.start()
        begun.wait()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_what_a_killed_process_has_left_is_no_owner(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("1")
    assert is_free(tmp_path)


@pytest.mark.child
def test_the_lock_of_a_killed_process_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pared.files.directories.lock import owned\n"
        "with owned(Path(sys.argv[1])):\n    print('owned', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert not is_free(tmp_path)
        child.send_signal(signal.SIGKILL)
    assert is_free(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.child
def test_a_forked_child_that_ends_takes_the_lock_with_it_from_nobody(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from pared.files.directories.lock import owned\n"
        "from tests.files.directories.test_lock import is_free\n"
        "with owned(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n        sys.exit()\n"  # through the `with`
        "    os.waitpid(child, 0)\n    print(is_free(Path(sys.argv[1])))"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_a_place_for_no_file_is_told(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(FileError, match="cannot be written"), owned(tmp_path):
        pass
