"""What the process of one architecture does: within bounds of memory and time, and silently."""

from __future__ import annotations

import contextlib
import os
import resource  # not on Windows
import warnings
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

SECONDS: Final = 300  # of processor, then the process is killed
MEMORY: Final = 6 * 2**30  # bytes


def run(name: str, to: Connection) -> None:
    """Measure one architecture, and send its row as JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    import torch  # torch and transformers are imported already in the process that this one is forked from
    import transformers

    from bench.architectures.measure import measure
    from bench.architectures.small import NotSmallError

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            to.send(asdict(measure(name)))
        except NotSmallError as error:
            to.send({"name": name, "skipped": str(error)})
