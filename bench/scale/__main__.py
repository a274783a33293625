"""Measure `make bench-scale`: costs of tasks on Ray, 1 to 3 workers on this machine, and what follows for 8 to 512."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.scale import plan
from bench.scale.measuring import TASKS, measured
from bench.scale.simulation import Costs, seconds

RESULTS = Path("out/bench/scale.json")
SOURCE = Path(f"out/data/scale/{TASKS}.safetensors")
_SIDE = 2048
_EACH = 64  # tasks of each worker, where many are simulated


def costs_of(found: dict[str, Any]) -> Costs:
    """What a task costs, in processor seconds, which do not depend on what else the machine does.

    One process packs and writes; with workers the driver writes.
    """
    local, one = (min(found["processors"][name]) / TASKS for name in ("local", "1"))
    driver = min(found["driver"]["1"]) / TASKS
    return Costs(local - driver, max(found["empty"]["seconds"], one - local), driver)


def rate() -> float:
    """Operations in a second of one thread that multiplies matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.randn(_SIDE, _SIDE)
    x @ x
    best = min(_seconds(x) for _ in range(5))
    torch.set_num_threads(threads)
    return 2 * _SIDE**3 / best


def _seconds(x: torch.Tensor) -> float:
    began = time.perf_counter()
    x @ x
    return time.perf_counter() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--again", action="store_true", help="only simulate, with the figures of the last run")
    given = options.parse_args()
    found = json.loads(RESULTS.read_text())["measured"] if given.again else measured(SOURCE)
    costs = costs_of(found)
    cores = found["cores"]
    simulated = {
        str(workers): seconds(costs, TASKS, 1) / seconds(costs, TASKS, min(workers, cores)) for workers in (1, 2, 3)
    }
    alone = seconds(costs, _EACH, 1)
    many = {str(workers): alone / seconds(costs, _EACH * workers, workers) for workers in plan.WORKERS}
    rated = found.setdefault("rate", rate())
    network = found["sent"]["nbytes"] / found["sent"]["seconds"]
    weights = found["source"] // 4 // TASKS
    best = {name: min(times) for name, times in found["seconds"].items()}
    result = {
        "measured": found,
        "speed-up": {name: best["1"] / one for name, one in best.items()},
        "overhead": costs.handing / (costs.work + costs.driver),
        "costs": vars(costs),
        "simulated": simulated,
        "efficiency": many,
        "data-free": {name: plan.data_free(model, costs, weights) for name, model in plan.MODELS.items()},
        "calibrated": {name: plan.calibrated(model, rated, network) for name, model in plan.MODELS.items()},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
