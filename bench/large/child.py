"""One fit block by block, on random tokens, in this process or on workers of a Ray cluster of this machine."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pared.executors.executor import Executor
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.hugging_face.loading import skeleton_in
from pared.fitting.streamed.fit import fit_folder
from pared.switches import threads

_NODE_MEMORY = 6 << 30  # bytes that each says it has: the largest task declares four


@contextmanager
def executor(workers: int) -> Iterator[Executor | None]:
    """Workers of one core each; none for 0."""
    if not workers:
        yield None
        return
    from bench.scale.measuring import NODE, Cluster, on

    node = {**NODE, "memory": _NODE_MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(workers - 1):
            cluster.add_node(**node)
        with threads(1), on(cluster) as found:
            yield found
    finally:
        cluster.shutdown()


def main() -> None:
    """Fit it."""
    options = argparse.ArgumentParser(description=__doc__)
    for name in ("folder", "work", "output"):
        options.add_argument(name, type=Path)
    for name in ("samples", "tokens", "workers"):
        options.add_argument(name, type=int)
    options.add_argument("bits", type=float)
    given = options.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    model = skeleton_in(given.folder)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    rows = next(iter(model.parameters())).shape[0]
    generator = torch.Generator().manual_seed(0)
    each = (1, given.tokens)
    batches = [{"input_ids": torch.randint(0, rows, each, generator=generator)} for _ in range(given.samples)]
    conf = PostTrainingQuantConfig(approach="weight_only", max_size=int(numbers * given.bits / 8))
    with executor(given.workers) as workers:
        fit_folder(given.folder, conf, batches, given.work, given.output, executor=workers)


if __name__ == "__main__":
    main()
