"""What is wrong with workers is said before any work."""

import os
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import pared
from pared.cli import main
from pared.errors import ConfigError, WorkerError
from pared.executors import cluster as module
from pared.executors.cluster import RayExecutor
from pared.executors.executor import Task
from tests.executors.clusters import MEMORY

OTHER = "0.0.0+other"


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"workers: Ray is not installed\n  pip install 'pared\[ray\]'"):
        RayExecutor("ray://head:10001")


@pytest.mark.parametrize("address", ["", "head", "head:", ":1", "head:ray", "ray://head", "ray://head:99999"])
def test_an_address_has_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ConfigError, match="is not an address of a Ray cluster"):
        module._check_answers(address, 1)


@pytest.mark.ray
@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_an_address_where_nothing_answers(prefix: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # somebody listens there, and says nothing
        address = f"{prefix}127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(WorkerError, match="no Ray cluster answers within 0.5 seconds"):
            RayExecutor(address, timeout=0.5)
    with pytest.raises(WorkerError, match=r"no Ray cluster answers within 20 seconds \(ConnectionRefusedError"):
        RayExecutor(address, timeout=20)


@pytest.mark.ray
def test_the_command_line_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    save_file({"w": np.ones((4, 4), np.float32)}, tmp_path / "m.safetensors")
    arguments = ["compress", str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "out"), "--workers", "127.0.0.1:1"]
    monkeypatch.setattr(sys, "argv", ["pared", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "127.0.0.1:1: no Ray cluster answers within 60 seconds" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.child
def test_other_versions_are_refused(two_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pared, "__version__", OTHER)
    said = rf"the node 127.0.0.1:\d+: has pared .*, and this process {re.escape(OTHER)}"
    with pytest.raises(WorkerError, match=said):
        RayExecutor(two_nodes.address)


@pytest.mark.ray
@pytest.mark.child
def test_files_that_workers_do_not_see_are_refused(two_nodes: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    os.dup2(descriptor, 900)  # no worker has one of this number
    with RayExecutor(two_nodes.address) as workers:
        workers.check_files([tmp_path / "file"])
        with pytest.raises(WorkerError, match=r"/proc/self/fd/900 on the node .*: is not there"):
            workers.check_files([Path("/proc/self/fd/900")])
        os.write(1, b"here it is what pytest captures, and there a log")
        with pytest.raises(WorkerError, match=r"/proc/self/fd/1 on the node .*: is another file there than here"):
            workers.check_files([Path("/proc/self/fd/1")])
    os.close(descriptor)
    os.close(900)


def refuse(number: int) -> None:
    raise ConfigError("is refused", where=str(number), remedy="Pass another.")


def negative(number: int) -> int:
    return -number


def task(nbytes: int) -> Task[int, int]:
    return Task("work", negative, lambda _: nbytes)


@pytest.mark.ray
@pytest.mark.child
def test_memory_is_what_tasks_wait_for(two_nodes: Any) -> None:
    with RayExecutor(two_nodes.address) as workers:
        assert list(workers.map(task(MEMORY), [1, 2, 3])) == [-1, -2, -3]
        with pytest.raises(WorkerError, match="work: needs .* and no node has more than"):
            list(workers.map(task(2 * MEMORY), [1]))


@pytest.mark.ray
@pytest.mark.child
def test_what_a_task_raises_is_raised(two_nodes: Any) -> None:
    with RayExecutor(two_nodes.address) as workers:
        with pytest.raises(ConfigError, match="3: is refused\n  Pass another."):
            list(workers.map(Task("work", refuse, lambda _: 0), [3]))
        with pytest.raises(ZeroDivisionError):
            list(workers.map(Task("work", divided, lambda _: 0), [1, 0]))


def divided(number: int) -> float:
    return 1 / number


def test_where_the_dashboard_is_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Connected:
        dashboard_url = "10.0.0.1:8265"

    def connect(self: RayExecutor, *_: Any, **__: Any) -> None:
        self._ray, self._address, self._owns = ray, "head:6379", True
        self._connect()

    ray = SimpleNamespace(init=lambda **_: Connected, shutdown=lambda: None)
    monkeypatch.setattr(RayExecutor, "__init__", connect)
    lines: list[str] = []
    with module.executor_at("head:6379", lines.append):
        assert lines == ["dashboard: http://10.0.0.1:8265"]
