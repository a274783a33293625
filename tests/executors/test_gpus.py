"""Tasks of a fit get GPUs where nodes say they have them; whether torch sees these is looked at there."""

from typing import Any

import pytest
import torch

from pared.errors import ConfigError, WorkerError
from pared.executors import cluster as module
from pared.executors.cluster import RayExecutor
from pared.executors.executor import Task
from pared.switches import device
from tests.executors.clusters import cluster, settings

pytestmark = [pytest.mark.ray, pytest.mark.child]
FIT: Task[int, str] = Task("fitting", lambda _: device(), lambda _: 0, on_device=True)
OTHER: Task[int, str] = Task("another thing", lambda _: device(), lambda _: 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_are_for_tasks_of_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(gpus=1) as found:
        with RayExecutor(found.address) as workers:
            assert workers.device == ("cuda" if module._torch_has_gpus() else "cpu"), "every node has one"
        monkeypatch.setattr(module, "_torch_has_gpus", lambda: True)
        with RayExecutor(found.address) as workers:
            assert workers.device == "cuda", "every node has one"
            assert list(workers.map(OTHER, [1])) == ["cpu"]
            with pytest.raises(WorkerError, match="sees no GPU there, and Ray has given it one"):
                list(workers.map(FIT, [1]))
        with RayExecutor(found.address, gpus=0) as workers:
            assert list(workers.map(FIT, [1])) == ["cpu"]
        found.add_node(**settings())
        with RayExecutor(found.address) as workers:
            assert workers.device == "cpu", "one of two nodes has none"
        with RayExecutor(found.address, gpus=0.5) as workers:
            assert workers.device == "cuda"
        with pytest.raises(WorkerError, match="has no node with 2 GPUs for a task"):
            RayExecutor(found.address, gpus=2)


@pytest.mark.parametrize("gpus", [-1, 1.5, "1", True, float("nan"), float("inf")])
def test_a_number_of_gpus(gpus: Any) -> None:
    with pytest.raises(ConfigError, match="expected a number of GPUs"):
        RayExecutor("127.0.0.1:1", gpus=gpus)
