"""What is measured here: the seam itself, a task on a Ray worker, its result's way to the driver, 1 to 3 workers."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

# Before Ray is imported: nothing leaves this machine, whose own name is the loopback's.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # its name in Ray; otherwise all else goes before workers

import numpy as np
import psutil
from numpy.typing import NDArray
from ray.cluster_utils import Cluster
from safetensors.numpy import save_file

import pared
from pared.executors.cluster import SHARE, RayExecutor
from pared.executors.executor import Executor, LocalExecutor, Task
from pared.files.threads import at_most

NODE: Final[dict[str, Any]] = {
    "num_cpus": 1,
    "node_ip_address": "127.0.0.1",
    "object_store_memory": 400 << 20,
    "memory": 4 << 30,
}
TASKS: Final = 16
EMPTY: Final = 200  # tasks that do nothing
PAYLOAD: Final = 16 << 20  # bytes of a result: of 64 MB of weights in float32 at 8 bits
BITS: Final = 4
ROUNDS: Final = 5


def nothing(_: int) -> None:
    """A task without work."""


def wait(_: int) -> None:
    """A task that takes long enough for every worker to get one."""
    time.sleep(0.5)


def payload(_: int) -> NDArray[np.uint8]:
    """A task whose result is large."""
    return np.zeros(PAYLOAD, np.uint8)


def checkpoint(path: Path) -> None:
    """Tensors of 64 MB each, whose rows differ in scale."""
    rng = np.random.default_rng(0)
    side = int((SHARE / 4) ** 0.5)
    tensors = {}
    for i in range(TASKS):
        scale = 0.02 * np.exp(0.3 * rng.standard_normal((side, 1), dtype=np.float32))
        tensors[f"layers.{i}.weight"] = rng.standard_normal((side, side), dtype=np.float32) * scale
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def clock(work: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds of the clock, processor seconds of this process, and of all that it has started."""
    before, began = _used(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - began, _used()
    own = psutil.Process().pid
    return seconds, after[own] - before[own], sum(after.values()) - sum(before.get(pid, 0.0) for pid in after)


def _used() -> dict[int, float]:
    """Processor seconds of this process and of the workers that it has started; what else Ray runs does no task."""
    found = {}
    for one in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.Error):  # it has just ended
            title = " ".join(one.cmdline())
            if one.pid == os.getpid() or (title.startswith("ray::") and "Agent" not in title):
                times = one.cpu_times()
                found[one.pid] = times.user + times.system
    return found


def compressed(source: Path, executor: Executor) -> tuple[float, float, float]:
    """What `clock` says of a compression."""
    output = source.with_name("out")
    shutil.rmtree(output, ignore_errors=True)
    return clock(lambda: pared.compress(source, output, bits=BITS, executor=executor))


@contextmanager
def clusters() -> Iterator[dict[int, Cluster]]:
    """Clusters of 1, 2 and 3 nodes of one core; those that are not used wait."""
    found = {}
    try:
        for nodes in (1, 2, 3):
            found[nodes] = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
            for _ in range(nodes - 1):
                found[nodes].add_node(**NODE)
        yield found
    finally:
        for one in found.values():
            one.shutdown()
        psutil.wait_procs(psutil.Process().children(recursive=True), timeout=30)


@contextmanager
def on(cluster: Cluster) -> Iterator[RayExecutor]:
    """An executor on a cluster, whose processes have started."""
    with RayExecutor(cluster.address) as workers:
        list(workers.map(Task("waiting", wait, lambda _: 0), range(4 * workers.workers)))
        yield workers


def seam() -> float:
    """Seconds of the seam for each task on one machine."""
    tasks = range(100_000)
    direct, *_ = clock(lambda: [nothing(one) for one in tasks])
    mapped, *_ = clock(lambda: list(LocalExecutor().map(Task("empty", nothing, lambda _: 0), tasks)))
    return max(0.0, mapped - direct) / len(tasks)


def measured(source: Path) -> dict[str, Any]:
    """All figures. The machine may be busy: what is compared was measured in turns."""
    if not source.is_file():
        checkpoint(source)
    with at_most(1):
        compressed(source, LocalExecutor())  # the file is in memory
    found: dict[str, Any] = {"load": os.getloadavg()[0], "cores": os.cpu_count(), "seam": seam()}
    runs: dict[str, list[tuple[float, float, float]]] = {"local": [], "1": [], "2": [], "3": []}
    began: dict[str, list[float]] = {}
    with clusters() as there:
        for _ in range(ROUNDS):
            with at_most(1):
                runs["local"].append(compressed(source, LocalExecutor()))
            for nodes, cluster in there.items():
                with on(cluster) as workers:
                    began.setdefault(str(nodes), []).append(compressed(source, workers)[2])  # imports, and maps files
                    runs[str(nodes)].append(compressed(source, workers))
        with on(there[1]) as workers:
            idle, _, used = clock(lambda: list(workers.map(Task("empty", nothing, lambda _: 0), range(EMPTY))))
            large = Task("large", payload, lambda _: 0)
            sent, driver, _ = clock(lambda: [None for _ in workers.map(large, range(TASKS))])
    found["empty"] = {"seconds": idle / EMPTY, "processors": used / EMPTY}
    found["sent"] = {"nbytes": TASKS * PAYLOAD, "seconds": sent, "driver": driver}
    found["source"] = source.stat().st_size
    found["begun"] = {nodes: min(began[nodes]) - min(one[2] for one in runs[nodes]) for nodes in began}
    found["nbytes"] = (source.with_name("out") / "best_model.pt").stat().st_size
    for place, name in enumerate(("seconds", "driver", "processors")):
        found[name] = {workers: [one[place] for one in times] for workers, times in runs.items()}
    found["ratios"] = {
        workers: [one[0] / other[0] for one, other in zip(runs["1"], times, strict=True)]
        for workers, times in runs.items()
    }
    return found
