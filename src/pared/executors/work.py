"""What a worker does with a task, in its share of the node's cores; what it logs goes back with the result."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final, TypeVar

from pared.errors import WorkerError
from pared.files.threads import at_most
from pared.switches import computing_on, threads

InputT = TypeVar("InputT")
ResultT = TypeVar("ResultT")

LOG: Final = logging.getLogger("pared")


class _Collector(logging.Handler):
    """Keeps records, with their texts made, so that they can be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self.records.append(record)


@contextmanager
def collected(level: int) -> Iterator[list[logging.LogRecord]]:
    """What is logged at this level and above while the context lasts."""
    before, handler = (LOG.level, LOG.propagate), _Collector()
    LOG.setLevel(level)
    LOG.propagate = False
    LOG.addHandler(handler)
    try:
        yield handler.records
    finally:
        LOG.removeHandler(handler)
        LOG.level, LOG.propagate = before


def run(
    work: Callable[[InputT], ResultT], one: InputT, cores: int, level: int, device: str
) -> tuple[ResultT, list[logging.LogRecord]]:
    """Do it.

    Args:
        work: `Task.run`.
        one: the input.
        cores: how many it may use.
        level: the least level of what the driver logs.
        device: see `switches.device`.

    Returns:
        the result, and what was logged.

    Raises:
        WorkerError: torch has no such device here.
    """
    _check_device(device)
    with at_most(cores), _torch_on(cores), computing_on(device), collected(level) as records:
        return work(one), records


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise WorkerError(
            f"torch {torch.__version__} sees no GPU there, and Ray has given it one",
            where=f"the node {socket.gethostname()}",
            remedy="Install a torch for the GPU on every node, start them with ray start --num-gpus=0, or pass "
            "RayExecutor(gpus=0).",
        )


def _torch_on(cores: int) -> AbstractContextManager[None]:
    """Torch with as many threads, on which the last bits of products depend; what needs it has imported it."""
    return threads(cores) if "torch" in sys.modules else nullcontext()
