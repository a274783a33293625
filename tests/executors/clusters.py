"""Ray clusters of one machine: every process listens on loopback, memory is bounded, and nothing stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

OBJECT_STORE = 200 << 20  # bytes
CLIENT_PORT = 21001
MEMORY = 4 << 30  # bytes that a node says it has

# Before Ray is imported: nothing leaves the machine, and its own name is the loopback's.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # its name in Ray; otherwise all else goes before workers
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"


@contextmanager
def cluster(memory: int = MEMORY, gpus: int = 0) -> Iterator[Any]:
    """A node with one core, to which others can be added."""
    utils = pytest.importorskip("ray.cluster_utils")
    head = {**settings(memory, gpus), "include_dashboard": False, "ray_client_server_port": CLIENT_PORT}
    found = utils.Cluster(initialize_head=True, head_node_args=head)
    try:
        yield found
    finally:
        found.shutdown()
        psutil.wait_procs(processes(), timeout=30)


def settings(memory: int = MEMORY, gpus: int = 0) -> dict[str, Any]:
    """What all nodes have in common; how many GPUs a node says it has need not be true."""
    shares = {"num_cpus": 1, "num_gpus": gpus, "memory": memory, "object_store_memory": OBJECT_STORE}
    return {**shares, "node_ip_address": "127.0.0.1"}


def processes(name: str = "") -> list[psutil.Process]:
    """Ray's processes that this one started, or of these the workers that run a task of this name."""
    found = []
    for one in psutil.Process().children(recursive=True):
        try:
            title = " ".join(one.cmdline())
        except psutil.Error:  # it has just ended
            continue
        if title.startswith(f"ray::{name}") if name else "ray" in title:
            found.append(one)
    return found


def raylet_of(node: Any) -> psutil.Process:
    """The process that is a node: kill -9 of it is what the others see of a machine that loses its power."""
    (process,) = node.all_processes["raylet"]
    return psutil.Process(process.process.pid)
