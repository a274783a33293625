"""A fit block by block gives the same bytes on workers, whatever dies meanwhile."""

import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pared
from pared.errors import FileError, WorkerError
from pared.executors.cluster import RayExecutor
from pared.executors.executor import Task
from pared.files.threads import usable_cores
from pared.switches import threads
from tests.executors.clusters import processes, raylet_of, settings
from tests.fitting.streamed.models import small, some_calls, written

pytestmark = [pytest.mark.ray, pytest.mark.child]
BATCHES = [dict(call.kwargs) for call in some_calls(13)]
CONF = pared.PostTrainingQuantConfig(approach="weight_only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(small("Llama", tied=True, layers=3), tmp_path_factory.mktemp("models") / "llama")


def fitted(folder: Path, at: Path, executor: RayExecutor | None = None) -> bytes:
    path: Any = pared.fit(folder, CONF, BATCHES, workspace=at / "work", quiet=True, executor=executor)
    return bytes(Path(path).read_bytes())


@pytest.mark.usefixtures("one_thread")
def test_workers_give_the_same_bytes_and_may_be_killed(two_nodes: Any, folder: Path, tmp_path: Path) -> None:
    here = fitted(folder, tmp_path / "here")
    killed = []

    def kill() -> None:
        while not (working := processes("measuring a block")):
            time.sleep(0.001)
        working[0].send_signal(signal.SIGKILL)
        killed.append(working[0].pid)

    with RayExecutor(two_nodes.address) as workers:
        assert fitted(folder, tmp_path / "two", workers) == here
        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        assert fitted(folder, tmp_path / "killed", workers) == here
        thread.join()
    assert killed


@pytest.mark.usefixtures("one_thread")
def test_a_raylet_may_be_killed(two_nodes: Any, folder: Path, tmp_path: Path) -> None:
    here = fitted(folder, tmp_path / "here")
    doomed = two_nodes.add_node(**settings())
    raylet = raylet_of(doomed)

    def kill() -> None:
        while not any((tmp_path / "killed" / "work").glob("traced-*")):
            time.sleep(0.001)
        raylet.send_signal(signal.SIGKILL)

    with RayExecutor(two_nodes.address) as workers:
        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        assert fitted(folder, tmp_path / "killed", workers) == here
        thread.join()
    two_nodes.remove_node(doomed, allow_graceful=False)


def test_a_full_disk_is_told_and_what_was_done_stays(two_nodes: Any, folder: Path, tmp_path: Path) -> None:
    """Each of a worker's files is limited, as on a node whose disk, or quota, is full."""
    with RayExecutor(two_nodes.address) as workers, threads(1):
        here = fitted(folder, tmp_path / "here")
        limit = Task("limit", limit_files, lambda _: 0)
        try:
            list(workers.map(limit, [1 << 10] * 8))
            with pytest.raises(FileError, match="cannot be written|the disk is full|File too large"):
                fitted(folder, tmp_path / "full", workers)
        finally:
            list(workers.map(limit, [resource.RLIM_INFINITY] * 8))
        assert fitted(folder, tmp_path / "full", workers) == here


def limit_files(nbytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then it is an error, and not the end
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))
    time.sleep(0.3)  # so that every worker gets some


def test_two_threads_are_those_of_a_task_with_two_cores(two_nodes: Any, folder: Path, tmp_path: Path) -> None:
    added = two_nodes.add_node(**{**settings(), "num_cpus": 2})
    with threads(1), RayExecutor(two_nodes.address, cores=2) as workers:
        assert list(workers.map(Task("threads", asked_of_torch, lambda _: 0), [1])) == [(2, 2)]
        there = fitted(folder, tmp_path / "there", workers)
    two_nodes.remove_node(added)
    with threads(2):
        assert fitted(folder, tmp_path / "here") == there


def asked_of_torch(_: int) -> tuple[int, int]:
    return torch.get_num_threads(), usable_cores()


def test_a_workspace_that_workers_do_not_see_is_refused(two_nodes: Any, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    os.dup2(descriptor, 901)  # no worker has one of this number
    with RayExecutor(two_nodes.address) as workers:
        workers.check_writes(tmp_path)
        with pytest.raises(WorkerError, match=r"/proc/self/fd/901 on the node .*: cannot be written \(No such file"):
            workers.check_writes(Path("/proc/self/fd/901"))
    assert list(tmp_path.iterdir()) == []
    os.close(descriptor)
    os.close(901)
