"""The same bytes come of this process and of any number of workers, whatever dies meanwhile."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import pared
from pared.checkpoints import compress
from pared.executors.executor import LocalExecutor
from pared.files.remote import urls
from tests.executors.clusters import CLIENT_PORT, processes, raylet_of, settings
from tests.executors.conftest import Work, Workers

pytestmark = [pytest.mark.ray, pytest.mark.child]
TASK = "packing tensors"


def test_one_worker_gave_the_same_bytes(work: Work) -> None:
    assert work.one_worker == work.here


def test_two_workers_give_the_same_bytes(two_nodes: Any, work: Work, tmp_path: Path) -> None:
    with Workers(two_nodes.address) as workers:
        assert pared.compress(work.source, tmp_path, bits=4, executor=workers).read_bytes() == work.here
        sized = pared.compress(work.source, tmp_path / "sized", max_size=2_500_000, executor=workers).read_bytes()
    assert pared.compress(work.source, tmp_path, max_size=2_500_000).read_bytes() == sized


@pytest.mark.usefixtures("two_nodes")
def test_a_client_gives_the_same_bytes(work: Work, tmp_path: Path) -> None:
    with Workers(f"ray://127.0.0.1:{CLIENT_PORT}") as workers:
        assert pared.compress(work.source, tmp_path, bits=4, executor=workers).read_bytes() == work.here


def test_extra_state_is_sent(two_nodes: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pt"
    torch.save({"w": torch.randn(64, 64), "scale._extra_state": {"history": [1, 2], "x": torch.arange(3)}}, path)
    here = pared.compress(path, tmp_path / "here").read_bytes()
    with Workers(two_nodes.address) as workers:
        assert pared.compress(path, tmp_path / "there", executor=workers).read_bytes() == here


def meanwhile(happens: Callable[[], object], output: Path) -> threading.Thread:
    """Do something as soon as some tensors are in the journal, and not all."""

    def wait() -> None:
        journal = output / ".pared-compress" / "journal.jsonl"
        while not journal.exists() or len(journal.read_bytes().splitlines()) < 4:
            time.sleep(0.01)
        happens()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_killed_worker_costs_nothing_but_time(two_nodes: Any, work: Work, tmp_path: Path) -> None:
    killed = []

    def kill() -> None:
        while not (working := processes(TASK)):
            time.sleep(0.01)
        working[0].send_signal(signal.SIGKILL)
        killed.append(working[0].pid)

    with Workers(two_nodes.address) as workers:
        thread = meanwhile(kill, tmp_path)
        assert pared.compress(work.source, tmp_path, bits=4, executor=workers).read_bytes() == work.here
    thread.join()
    assert killed


def test_a_third_node_may_be_killed(two_nodes: Any, work: Work, tmp_path: Path) -> None:
    doomed = two_nodes.add_node(**settings())
    with Workers(two_nodes.address) as workers:
        assert pared.compress(work.source, tmp_path / "three", bits=4, executor=workers).read_bytes() == work.here
        thread = meanwhile(lambda: two_nodes.remove_node(doomed, allow_graceful=False), tmp_path / "killed")
        assert pared.compress(work.source, tmp_path / "killed", bits=4, executor=workers).read_bytes() == work.here
        thread.join()
    with Workers(two_nodes.address) as workers:  # Ray may still count it among those that are alive
        assert pared.compress(work.source, tmp_path / "after", bits=4, executor=workers).read_bytes() == work.here


def test_a_raylet_may_be_killed(two_nodes: Any, work: Work, tmp_path: Path) -> None:
    """All of a node's processes end with it; nobody tells the others."""
    doomed = two_nodes.add_node(**settings())
    raylet = raylet_of(doomed)
    with Workers(two_nodes.address) as workers:
        thread = meanwhile(lambda: raylet.send_signal(signal.SIGKILL), tmp_path)
        assert pared.compress(work.source, tmp_path, bits=4, executor=workers).read_bytes() == work.here
        thread.join()
    assert not raylet.is_running() or raylet.status() == "zombie"
    two_nodes.remove_node(doomed, allow_graceful=False)


_DRIVER = """
import os, sys
from pared.checkpoints.journal import Journal
from pared.executors.cluster import RayExecutor
import pared
add, left = Journal.add, 8
def dying(self, *tensor):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)
    add(self, *tensor)
Journal.add = dying
RayExecutor.share = 1 << 18
pared.compress(sys.argv[1], sys.argv[2], bits=4, executor=RayExecutor(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [False, True])
def test_a_killed_driver_goes_on_with_workers_or_without(
    two_nodes: Any, work: Work, tmp_path: Path, workers: bool
) -> None:
    arguments = [str(work.source), str(tmp_path), two_nodes.address]
    child = subprocess.run([sys.executable, "-c", _DRIVER, *arguments], check=False)
    assert child.returncode == -signal.SIGKILL
    with Workers(two_nodes.address) if workers else nullcontext(LocalExecutor()) as executor:
        done = compress.run(work.source, tmp_path, bits=4, quiet=True, executor=executor)
    assert done.resumed == 7
    assert done.path.read_bytes() == work.here


def test_every_node_copies_a_url(two_nodes: Any, work: Work, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    url = f"file://{work.source}"
    with Workers(two_nodes.address) as workers:
        path = pared.compress(url, f"file://{tmp_path}/there", bits=4, executor=workers)
    for one in (url, f"file://{tmp_path}/there"):
        shutil.rmtree(urls._place(one))
    assert str(path) == f"file:{tmp_path}/there/best_model.pt"
    assert (tmp_path / "there" / "best_model.pt").read_bytes() == work.here
