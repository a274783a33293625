"""Workers of a Ray cluster. Placement, retries and the transfer of objects are Ray's (docs/decisions/053)."""

from __future__ import annotations

import importlib
import logging
import math
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pared.errors import ConfigError, WorkerError, reason_of
from pared.executors import probe, work
from pared.executors.executor import Executor, InputT, LocalExecutor, ResultT, Task
from pared.files.remote import urls

log = logging.getLogger(__name__)

SHARE: Final = 1 << 26  # bytes of tensors: one core takes about a second for them, and handing them out takes less
_AHEAD: Final = 3  # tasks for each core that are handed out before the result of the first is taken
_NODES_COME: Final = 5.0  # how often the number of workers is asked for, in seconds
_TRIES: Final = 3  # how often a task is done again whose worker, or whose node, died
_TIMEOUT: Final = 60.0  # seconds
_PREFIX: Final = "ray://"
_INSTALL: Final = "pip install 'pared[ray]' here and on every node, or leave --workers out: one machine needs no Ray."


class RayExecutor:
    """Runs tasks on the workers of a Ray cluster, one core for each. A context manager.

    The same bytes come of any number of workers. A task whose worker died is done again elsewhere; memory is declared
    for each, so that Ray puts no more on a node than it has.

    Args:
        address: "ray://HOST:10001" of a cluster's Ray Client server; "HOST:6379", the cluster that this machine
            belongs to; "auto": that one, wherever it is. Ignored where this process is connected already.
        cores: those of each task. More of them share the memory of one; the bytes of a fit depend on the number, as
            those of one machine depend on its number of threads.
        gpus: how many, or which share of one, each task of a fit has, which then sweeps and rounds there; other tasks
            have none. None: one, if every node has one and torch is made for GPUs; else none. There, two runs may
            differ in their last bits, and so do their bytes.
        timeout: the seconds after which a cluster, or one of its nodes, that does not answer is given up.

    Raises:
        ConfigError: Ray is not installed, or the address is none.
        WorkerError: nothing answers at the address, nodes have other versions of Python, Ray, torch, NumPy or pared, or
            none has as many cores or GPUs.
    """

    share = SHARE
    dashboard: str | None = None  # the address of the cluster's, where this process connected to one that has it

    def __init__(
        self, address: str = "auto", *, cores: int = 1, gpus: float | None = None, timeout: float = _TIMEOUT
    ) -> None:
        self._ray = _library()
        if not isinstance(cores, int) or cores < 1:
            raise ConfigError(
                f"cores={cores!r}: expected a whole number of cores", where="RayExecutor", remedy="Pass 1 or more."
            )
        if gpus is not None and not _is_number_of_gpus(gpus):
            raise ConfigError(
                f"gpus={gpus!r}: expected a number of GPUs",
                where="RayExecutor",
                remedy="Pass a whole number, or a share of 1.",
            )
        self._each = cores
        self._timeout = timeout
        self._address = address
        self._owns = not self._ray.is_initialized()
        if self._owns:
            _check_answers(address, timeout)
            self._connect()
        try:
            self._run = self._ray.remote(max_retries=_TRIES, num_cpus=cores)(work.run)
            self._check_versions()
            self._gpus = self._gpus_of(gpus)
            # Given here and not for each run: so Ray ends a process after its task, and no GPU stays another one's.
            self._run_there = self._ray.remote(max_retries=_TRIES, num_cpus=cores, num_gpus=self._gpus)(work.run)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster, unless this process was connected to it before."""
        if self._owns:
            self._ray.shutdown()

    def map(self, task: Task[InputT, ResultT], inputs: Sequence[InputT]) -> Iterator[ResultT]:
        """See `Executor`."""
        self._check_memory(task, inputs)
        shared = self._ray.put(task.run)
        level = work.LOG.getEffectiveLevel()
        given: deque[Any] = deque()
        most, asked = 0, -math.inf
        try:
            for one in inputs:
                if time.monotonic() - asked > _NODES_COME:
                    most, asked = _AHEAD * self.workers, time.monotonic()
                if len(given) >= most:
                    yield self._result(task.name, given.popleft())
                there = task.on_device and self._gpus
                run = (self._run_there if there else self._run).options(name=task.name, memory=task.memory(one))
                given.append(run.remote(shared, one, self._each, level, self.device if there else "cpu"))
            while given:
                yield self._result(task.name, given.popleft())
        finally:
            for reference in given:
                self._ray.cancel(reference, force=True)

    def check_files(self, files: Collection[Path]) -> None:
        """See `Executor`: a file counts as the same if its size, its beginning and its end are."""
        for url in urls.urls_of(files):
            log.info("%s: is copied to every node", url)
            self._asked(urls.fetched, lambda _, url=url: (url,), bounded=False)  # type: ignore[misc]  # bound now
        paths = tuple(str(path.absolute()) for path in files)
        here = {path: probe.look(path) for path in paths}
        for node, said in self._asked(probe.report, lambda _: (paths,)).items():
            for path, found in said["files"].items():
                if found != here[path]:
                    raise WorkerError(
                        "is not there" if found is None else "is another file there than here",
                        where=f"{path} on the node {node}",
                        remedy="Put the files on storage that all nodes mount at the same path, or copy them there.",
                    )

    def check_writes(self, directory: Path) -> None:
        """See `Executor`."""
        place = directory.absolute()

        def name(node: str) -> str:
            return f".pared-seen-{node.replace(':', '-')}"

        said = self._asked(probe.leave, lambda node: (str(place), name(node)))
        left = {node for node in said if (place / name(node)).exists()}
        for node in left:
            (place / name(node)).unlink()
        for node, why in said.items():
            if why or node not in left:
                raise WorkerError(
                    f"cannot be written ({why})" if why else "is another directory there than here",
                    where=f"{place} on the node {node}",
                    remedy="Put it on storage that all nodes mount at the same path.",
                )

    def _connect(self) -> None:
        try:
            context = self._ray.init(address=self._address, logging_level=logging.WARNING)
        except (RuntimeError, ConnectionError, ValueError) as error:  # Ray compares versions, too
            raise WorkerError(
                reason_of(error),
                where=self._address,
                remedy="Start the cluster with the Python and the Ray of this process, and check the address.",
            ) from error
        if context.dashboard_url:
            self.dashboard = f"http://{context.dashboard_url}"
            log.info("dashboard: %s", self.dashboard)

    def _nodes(self) -> list[dict[str, Any]]:
        """Those that do work."""
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        found = [node for node in alive if node["Resources"].get("CPU", 0) >= self._each]
        if not found:
            raise WorkerError(
                f"has no node with {self._each} cores for a task", where=self._address, remedy="Add one: ray start."
            )
        return found

    @property
    def workers(self) -> int:
        """See `Executor`; nodes come and go."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)) // self._each)

    @property
    def threads(self) -> int:
        """See `Executor`: one for each core of a task."""
        return self._each

    @property
    def device(self) -> str:
        """See `Executor`."""
        return "cuda" if self._gpus else "cpu"

    def _gpus_of(self, asked: float | None) -> float:
        """How many each task of a fit has."""
        of_nodes = [float(node["Resources"].get("GPU", 0)) for node in self._nodes()]
        if asked is None:
            return float(min(of_nodes) >= 1 and _torch_has_gpus())
        if asked > max(of_nodes):
            raise WorkerError(
                f"has no node with {asked:g} GPUs for a task",
                where=self._address,
                remedy="Add one, or pass RayExecutor(gpus=0).",
            )
        return asked

    def _check_memory(self, task: Task[InputT, ResultT], inputs: Sequence[InputT]) -> None:
        """Refuse a task for which no node has memory: Ray would wait for one."""
        needed = max(map(task.memory, inputs), default=0)
        gpus = self._gpus if task.on_device else 0
        able = [one["Resources"] for one in self._nodes() if one["Resources"].get("GPU", 0) >= gpus]
        most = max((one.get("memory", 0) for one in able), default=0)
        if needed > most:
            raise WorkerError(
                f"needs {needed:,} bytes of memory for its largest tensor, and no node has more than {int(most):,}",
                where=task.name,
                remedy="Add a node with more memory (ray start --memory=...), or do it on one machine with more.",
            )

    def _check_versions(self) -> None:
        here = probe.versions()
        for node, said in self._asked(probe.report, lambda _: ((),)).items():
            for name, version in said["versions"].items():
                if version != here[name]:
                    raise WorkerError(
                        f"has {name} {version}, and this process {here[name] or 'none'}"
                        if version
                        else f"has no {name}, which this process has ({here[name]}), in {said['executable']}",
                        where=f"the node {node}",
                        remedy="Install the same versions on every node: the bytes of the result depend on them.",
                    )

    def _asked(
        self,
        question: Callable[..., Any],
        arguments: Callable[[str], tuple[Any, ...]],
        *,
        bounded: bool = True,
    ) -> dict[str, Any]:
        """What a function says on each node, by the node's address, for which there are arguments.

        A node that died a moment ago is still among them, until Ray misses it: it is left out then.
        """
        placed = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        with _by_value(self._ray):
            asked = self._ray.remote(num_cpus=0, max_retries=_TRIES)(question)
            found = {}
            for node in self._nodes():
                there = asked.options(scheduling_strategy=placed(node["NodeID"], soft=False))
                found[_name(node)] = there.remote(*arguments(_name(node)))
        said = {}
        for name, reference in found.items():
            with self._without_dead(name):
                said[name] = self._result_within(name, reference, self._timeout if bounded else None)
        return said

    @contextmanager
    def _without_dead(self, name: str) -> Iterator[None]:
        """Ignore what a node does not do because it is dead."""
        try:
            yield
        except WorkerError:
            if name in map(_name, self._nodes()):
                raise
            log.warning("the node %s is dead: it does no work", name)

    def _result_within(self, node: str, reference: Any, timeout: float | None) -> Any:
        try:
            return self._ray.get(reference, timeout=timeout)
        except self._ray.exceptions.RayError as error:
            silent = isinstance(error, self._ray.exceptions.GetTimeoutError)
            raise WorkerError(
                f"does not answer within {timeout:g} seconds" if silent else reason_of(error),
                where=f"the node {node}",
                remedy="See whether it is alive (ray status), and what its logs say.",
            ) from error

    def _result(self, name: str, reference: Any) -> Any:
        try:
            result, records = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error  # as if it had been raised here
            raise
        except self._ray.exceptions.RayError as error:
            raise WorkerError(
                f"failed, and was done again {_TRIES} times: {reason_of(error)}",
                where=name,
                remedy="See the logs of the nodes. What was done stays: the same command goes on there.",
            ) from error
        for record in records:
            logging.getLogger(record.name).handle(record)
        return result


@contextmanager
def executor_at(address: str | None, tell: Callable[[str], object]) -> Iterator[Executor]:
    """The executor that a command asks for: this process if it names no cluster.

    Args:
        address: see `RayExecutor`.
        tell: is told where the cluster's dashboard is, if it has one.
    """
    if address is None:
        yield LocalExecutor()
        return
    with RayExecutor(address) as found:
        if found.dashboard is not None:
            tell(f"dashboard: {found.dashboard}")
        yield found


def _is_number_of_gpus(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        return False
    return value <= 1 or value == int(value)


def _torch_has_gpus() -> bool:
    """Whether torch was made for GPUs, here and, as versions are the same, on every node."""
    try:
        version = importlib.import_module("torch").version
    except ModuleNotFoundError:
        return False
    return bool(version.cuda or version.hip)


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def _library() -> Any:
    """Ray, which is imported only where it is asked for."""
    try:
        importlib.import_module("ray.util.scheduling_strategies")
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ConfigError("Ray is not installed", where="workers", remedy=_INSTALL) from None


@contextmanager
def _by_value(ray: Any) -> Iterator[None]:
    """Functions of the probe are sent as they stand: a node may have another pared, or none."""
    ray.cloudpickle.register_pickle_by_value(probe)
    try:
        yield
    finally:
        ray.cloudpickle.unregister_pickle_by_value(probe)


def _check_answers(address: str, timeout: float) -> None:
    """Refuse an address where no Ray answers; Ray itself would wait for minutes, or end the process."""
    if address == "auto":
        return
    host, _, port = address.removeprefix(_PREFIX).rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 1 << 16:
        raise ConfigError(
            f"{address!r} is not an address of a Ray cluster",
            where="workers",
            remedy='Pass "ray://HOST:10001", "HOST:6379", or "auto" on a node of the cluster.',
        )
    grpc = importlib.import_module("grpc")  # which Ray's client needs
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            grpc.channel_ready_future(channel).result(timeout)
    except (OSError, grpc.FutureTimeoutError) as error:
        raise WorkerError(
            f"no Ray cluster answers within {timeout:g} seconds ({reason_of(error)})",
            where=address,
            remedy="Start one (ray start --head), and see that no firewall is between.",
        ) from error
