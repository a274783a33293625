"""What the measured costs say of models of 70 B, 400 B and 1.6 T parameters: tasks, memory, hours, traffic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from bench.scale.simulation import Costs, seconds
from pared.executors.cluster import SHARE
from pared.fitting.calibration.blocks import WIDEST_BLOCK
from pared.fitting.streamed.shards.runs import shards_of

SAMPLES: Final = 128
TOKENS: Final = 2048  # of each sample
BITS: Final = 4
WORKERS: Final = (8, 16, 64, 128, 512)
CORES: Final = 32  # of each worker of a fit
_HALF, _FLOAT = 2, 4  # bytes of a number
_FEEDBACK: Final = 4  # operations for each weight and column of its block: factors, and rounding with feedback


@dataclass(frozen=True)
class Model:
    """The shape of a language model.

    Args:
        blocks: how many there are.
        matrices: rows and columns of a block's matrices, each with how many there are.
        active: of these, the share that one token passes, in the order of `matrices`.
        table: numbers of the embedding and the head.
        width: of the hidden states.
    """

    blocks: int
    matrices: tuple[tuple[int, int, int], ...]
    active: tuple[float, ...]
    table: int
    width: int

    @property
    def block(self) -> int:
        """Numbers of a block."""
        return sum(rows * columns * count for rows, columns, count in self.matrices)

    @property
    def parameters(self) -> int:
        """Numbers of the model."""
        return self.blocks * self.block + self.table

    @property
    def moments(self) -> int:
        """Numbers of a block's second moments."""
        return sum(columns * min(columns, WIDEST_BLOCK) * count for _, columns, count in self.matrices)


def _dense(blocks: int, width: int, inner: int, keys: int, words: int) -> Model:
    matrices = ((width, width, 2), (keys, width, 2), (inner, width, 2), (width, inner, 1))
    return Model(blocks, matrices, (1.0,) * 4, 2 * words * width, width)


MODELS: Final = {
    "70 B": _dense(80, 8192, 28672, 1024, 128_256),
    "400 B": _dense(126, 16384, 53248, 1024, 128_256),
    "1.6 T, 384 experts": Model(
        blocks=61,
        matrices=((7168, 7168, 4), (3072, 7168, 2 * 388), (7168, 3072, 388)),
        active=(1.0, 9 / 388, 9 / 388),
        table=2 * 160_000 * 7168,
        width=7168,
    ),
}


def data_free(model: Model, costs: Costs, weights: int) -> dict[str, Any]:
    """Compression without data.

    Args:
        model: its shape.
        costs: those of a task.
        weights: the numbers in that task.
    """
    own = SHARE // _HALF  # numbers in a task, of bfloat16
    scaled = Costs(costs.work * own / weights, costs.handing * own / weights, costs.driver * own / weights)
    tasks = math.ceil(model.parameters / own)
    hours = {workers: seconds(scaled, tasks, workers) / 3600 for workers in WORKERS}
    return {
        "parameters": model.parameters,
        "tasks": tasks,
        "core hours": tasks * (scaled.work + scaled.handing) / 3600,
        "hours": hours,
        "read": _HALF * model.parameters,
        "to driver": BITS * model.parameters // 8,
        "written": 2 * BITS * model.parameters // 8,  # the journal, and the artifact
    }


def calibrated(model: Model, rate: float, network: float) -> dict[str, Any]:
    """A fit block by block.

    Args:
        model: its shape.
        rate: operations in a second of one worker's core; all of a worker's are taken to be worth as much.
        network: bytes in a second that the driver takes.
    """
    rate *= CORES
    shards = len(shards_of(SAMPLES))
    products = (
        SAMPLES
        * TOKENS
        * 2
        * sum(
            rows * columns * count * share
            for (rows, columns, count), share in zip(model.matrices, model.active, strict=True)
        )
    )
    # Second moments of the gradients of each call; experts that no token of a call reached have none.
    squared = (
        SAMPLES
        * 2
        * sum(rows * columns * min(columns, WIDEST_BLOCK) * count for rows, columns, count in model.matrices)
    )
    rounding = _FEEDBACK * sum(
        rows * columns * min(columns, WIDEST_BLOCK) * count for rows, columns, count in model.matrices
    )
    forward, backward = products / rate, (3 * products + squared) / rate
    sent = 2 * _FLOAT * model.moments  # of all calls, and of the unseen ones
    tensors = sum(count for *_, count in model.matrices)

    def hours(workers: int) -> float:
        swept = -(-shards // min(workers, shards)) / shards
        solved = max(1 / min(workers, tensors), 1 / tensors)
        moved = (shards + 1) * sent / network  # to the driver, and from there to who traces
        return model.blocks * ((forward + backward) * swept + 2 * rounding / rate * solved + moved) / 3600

    return {
        "tasks": model.blocks * (2 * shards + 2 * tensors),
        "memory": _FLOAT * (3 * model.block + 4 * model.moments),
        "hours": {workers: hours(workers) for workers in WORKERS},
        "read": 2 * shards * _HALF * model.parameters,
        "states": 3 * _HALF * model.blocks * SAMPLES * TOKENS * model.width,
        "moments": model.blocks * (shards + 1) * sent,
    }
