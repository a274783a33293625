"""Measure `make bench-tensors`: what models and files of very many small tensors take, by the number of tensors.

Each has 2 x 2 numbers, so that all of the time is what a tensor costs, whatever is in it. Figures are processor seconds
of one thread, in a process of its own for each number of tensors, in which packages have been imported before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pared
from bench.markdown import markdown

RESULTS = Path("out/bench/tensors.json")
COUNTS = (1_000, 4_000, 20_000)
_SIDE, _BATCHES, _SAMPLES = 2, 4, 4


class Products(nn.Module):
    """A list of parameters, multiplied one after the other; orthogonal, so that the output keeps its size."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.linalg.qr(torch.randn(_SIDE, _SIDE))[0] for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x @ weight
        return x


def layers(count: int) -> nn.Module:
    """Layers of two tensors each, a weight and a bias."""
    model = nn.Sequential(*(nn.Linear(_SIDE, _SIDE) for _ in range(count // 2)))
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    return model


MODELS: dict[str, Callable[[int], nn.Module]] = {"a list of parameters": Products, "layers": layers}


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and the result."""
    start = time.process_time()
    done = work()
    return time.process_time() - start, done


def of_model(kind: str, count: int, folder: Path) -> dict[str, float]:
    model = MODELS[kind](count).eval()
    batches = [torch.randn(_SAMPLES, _SIDE) for _ in range(_BATCHES)]
    found: dict[str, float] = {}
    found["call"], _ = seconds(lambda: model(batches[0]))
    found["fit without data"], _ = seconds(lambda: pared.fit(model, quiet=True))
    found["fit"], q = seconds(lambda: pared.fit(model, calib_dataloader=batches, quiet=True))
    found["save"], _ = seconds(lambda: pared.save(q, folder))
    found["load"], _ = seconds(lambda: pared.load(folder, model=model))
    return found


def of_file(count: int, folder: Path) -> dict[str, float]:
    file = folder / "model.pt"
    torch.save({f"layers.{i}.weight": torch.randn(_SIDE, _SIDE) for i in range(count)}, file)
    found: dict[str, float] = {}
    found["inspect"], _ = seconds(lambda: pared.inspect(file).render())
    found["compress"], artifact = seconds(lambda: pared.compress(file, folder / f"{count}"))
    found["expand"], _ = seconds(lambda: pared.expand(artifact, folder / f"{count}.safetensors"))
    found["compare"], _ = seconds(lambda: pared.compare(file, artifact).render())
    return found


def in_child(kind: str, count: int) -> dict[str, Any]:
    """An error is a result, too."""
    command = [sys.executable, "-m", "bench.tensors", "--kind", kind, "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(kind: str, count: int) -> dict[str, float]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        measure = of_file if kind == "a file" else partial(of_model, kind)
        measure(2, Path(folder))  # imports
        return measure(count, Path(folder))


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    parts = []
    for kind, by_count in found.items():
        names = list(dict.fromkeys(name for one in by_count.values() for name in one if name != "error"))
        rows = [
            (f"{int(count):,}", *(f"{one[name]:.2f}" if name in one else one.get("error", "-") for name in names))
            for count, one in by_count.items()
        ]
        parts.append(markdown((f"tensors, {kind}", *names), rows))
    return "\n\n".join([*parts, "Processor seconds of one thread; each tensor has 2 x 2 numbers."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=max(COUNTS), help="the most tensors")
    parser.add_argument("--kind", help="(internal) one measurement in this process")
    parser.add_argument("--count", type=int, help="(internal)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.kind:
        print(json.dumps(one(options.kind, options.count)))
        return
    counts = [count for count in COUNTS if count <= options.limit]
    found = {kind: {str(count): in_child(kind, count) for count in counts} for kind in (*MODELS, "a file")}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))
    print(f"written: {RESULTS}; `make results-docs` puts the figures into the documents")


if __name__ == "__main__":
    main()
