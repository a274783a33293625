"""Tasks, and what runs them: the seam between the work and the machines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

InputT = TypeVar("InputT")
ResultT = TypeVar("ResultT")

LOCAL_SHARE: Final = 1 << 28  # bytes of tensors that the threads of one process divide among themselves


@dataclass(frozen=True)
class Task(Generic[InputT, ResultT]):
    """Work that depends on its input alone, so that it may be done anywhere, and done again.

    Args:
        name: what is done, for messages.
        run: does it for one input. It can be pickled, and so can its inputs and results. A file that it writes is
            written whole, and with the same bytes each time.
        memory: the most bytes in use while one thread does it for an input.
        on_device: whether it computes on `switches.device()`, and so gains from a GPU.
    """

    name: str
    run: Callable[[InputT], ResultT]
    memory: Callable[[InputT], int]
    on_device: bool = False


class Executor(Protocol):
    """Runs tasks."""

    @property
    def share(self) -> int:
        """The bytes of tensors that make a good task."""

    @property
    def workers(self) -> int:
        """The number of tasks that run at once; where it is 1, nothing is gained by dividing work."""

    @property
    def threads(self) -> int | None:
        """With how many threads torch computes in each task; None: as many as the process has that asks for it."""

    @property
    def device(self) -> str:
        """On what torch computes in tasks that are to be `on_device`: "cpu" or "cuda"."""

    def map(self, task: Task[InputT, ResultT], inputs: Sequence[InputT]) -> Iterator[ResultT]:
        """The results of a task, in the order of its inputs.

        Raises:
            WorkerError: no worker can do it.
            Exception: what the task raises.
        """

    def check_files(self, files: Collection[Path]) -> None:
        """Make sure that every worker can read these files.

        Raises:
            WorkerError: one cannot, or finds other files there.
        """

    def check_writes(self, directory: Path) -> None:
        """Make sure that every worker can write to a directory, and that what it writes is seen here.

        Raises:
            WorkerError: one cannot, or it is another directory there.
        """


class LocalExecutor:
    """Runs tasks in this process, one after the other; each uses all cores."""

    share = LOCAL_SHARE
    workers = 1
    threads = None
    device = "cpu"

    def map(self, task: Task[InputT, ResultT], inputs: Sequence[InputT]) -> Iterator[ResultT]:
        """See `Executor`.

        >>> list(LocalExecutor().map(Task("negate", lambda x: -x, lambda _: 0), [1, 2]))
        [-1, -2]
        """
        return map(task.run, inputs)

    def check_files(self, files: Collection[Path]) -> None:
        """See `Executor`: this process reads them anyway."""

    def check_writes(self, directory: Path) -> None:
        """See `Executor`: this process has written there."""
