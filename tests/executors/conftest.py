"""One cluster for all tests that leave it as it is: to start one takes ten seconds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import pared
from pared.executors.cluster import RayExecutor
from tests.executors.clusters import cluster, processes, settings


class Workers(RayExecutor):
    """Small tasks, so that there are many."""

    share = 1 << 18


@dataclass(frozen=True)
class Work:
    """A checkpoint, what one process makes of it, and what one worker made of it before there was a second."""

    source: Path
    here: bytes
    one_worker: bytes


def checkpoint(path: Path, count: int) -> Path:
    """Weights, biases and a mask."""
    rng = np.random.default_rng(0)
    tensors = {f"{i}.weight": rng.standard_normal((256, 256), dtype=np.float32) for i in range(count)}
    tensors |= {f"{i}.bias": rng.standard_normal(256, dtype=np.float32) for i in range(count)}
    tensors |= {"mask": np.full((4, 4), -np.inf, np.float32), "large": tensors["0.weight"].repeat(8, 0)}
    save_file(tensors, path)
    return path


@pytest.fixture(scope="session")
def work_and_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Work, Any]]:
    """The work, and a cluster of two nodes of one core each."""
    folder = tmp_path_factory.mktemp("work")
    source = checkpoint(folder / "model.safetensors", 64)
    here = pared.compress(source, folder / "here", bits=4).read_bytes()
    with cluster() as found:
        with Workers(found.address) as workers:
            one = pared.compress(source, folder / "one", bits=4, executor=workers).read_bytes()
        found.add_node(**settings())
        yield Work(source, here, one), found
    assert processes() == []


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a worker has it: sums of products depend on how many threads share them."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_nodes(work_and_nodes: tuple[Work, Any]) -> Any:
    """The cluster."""
    return work_and_nodes[1]


@pytest.fixture
def work(work_and_nodes: tuple[Work, Any]) -> Work:
    """The work."""
    return work_and_nodes[0]
