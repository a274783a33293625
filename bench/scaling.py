"""`make bench-scaling`: what it takes to fit, save, load and run, by size, samples and threads, as JSON in `out/bench`.

Transformers of random weights, 8 bits, calls of 128 tokens. Each measurement has a process of its own, so that its peak
memory is its own; beside them stand what the machine can do at most: a large int8 product and a copy.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn

import pared
from bench import kernels as timed
from bench.peers.__main__ import machine
from bench.run import OUT, medians
from bench.search import peak_memory
from pared import PostTrainingQuantConfig
from pared.runtime.kernels import linear
from pared.runtime.kernels.machine import available

RESULTS = OUT / "scaling.json"
FOLDER = OUT / "scaling"
TOKENS, BATCH, VOCABULARY = 128, 8, 1024
SAMPLES = 32
# The approximate number of parameters; width, layers.
SIZES = {10**6: (128, 5), 10**7: (256, 12), 10**8: (768, 14), 3 * 10**8: (1024, 24), 10**9: (2048, 20)}
SAMPLED = 10**7  # the size at which the number of samples varies
COUNTS = (8, 32, 128)
THREADS = (1, 2)
_ROUNDS = 9
_NEEDED = 22  # about how many bytes of memory each parameter needs while a model is fitted
_SIDE, _COPIED = 2048, 256 << 20


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.mixed(self.before(x)).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(seen)
        added: Tensor = x + self.narrow(nn.functional.gelu(self.wide(self.after(x))))
        return added


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.norm(self.blocks(self.table(ids)))
        return out


def build(size: int) -> nn.Module:
    torch.manual_seed(0)
    return Transformer(*SIZES[size]).eval()


def calls(samples: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [min(BATCH, samples - i) for i in range(0, samples, BATCH)]
    return [torch.randint(0, VOCABULARY, (n, TOKENS), generator=generator) for n in sizes]


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    done = work()
    return time.perf_counter() - start, done


def fit(size: int, samples: int) -> dict[str, Any]:
    """Fit a model and save it, so that the other tasks have a file."""
    model, batches = build(size), calls(samples)
    conf = PostTrainingQuantConfig(quant_level=0, calibration_sampling_size=samples)
    before = peak_memory()
    took, q = seconds(lambda: pared.fit(model, conf, batches, quiet=True))
    peak = peak_memory()
    saving, file = seconds(lambda: pared.save(q, FOLDER / str(size)))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "fit": took,
        "fit_peak": peak,
        "fit_before": before,
        "save": saving,
        "save_peak": peak_memory(),
        "bytes": file.stat().st_size,
    }


def load(size: int) -> dict[str, Any]:
    with torch.device("meta"):
        skeleton = Transformer(*SIZES[size]).eval()
    before = peak_memory()
    took, _ = seconds(lambda: pared.load(FOLDER / str(size), model=skeleton))
    return {"load": took, "load_peak": peak_memory(), "load_before": before}


def infer(size: int) -> dict[str, Any]:
    """Milliseconds of one call of 128 tokens and of eight."""
    model = build(size)
    q = pared.load(FOLDER / str(size), model=model)
    found: dict[str, Any] = {
        "products": sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and n != "table.weight")
    }
    for batch in (1, BATCH):
        (ids,) = calls(batch)
        found[f"batch_{batch}"] = medians(
            {"float32": lambda x=ids: model(x), "ours": lambda x=ids: q(x)}, _ROUNDS, warmup=2
        )
    return found


def limits() -> dict[str, float]:
    """Operations a second of a large product, int8 (codes in, floats out) and float32; bytes a second of a copy."""
    x, weight = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)
    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    runs: dict[str, Callable[[], object]] = {"float32": lambda: x @ weight, "copy": lambda: target.copy_(source)}
    if not available():
        packed, codes = linear.pack(*timed.quantized(weight)), torch.randint(0, 128, (_SIDE, _SIDE), dtype=torch.uint8)
        runs["int8"] = lambda: _product(codes, packed)
    best = {name: found["least"] / 1e3 for name, found in medians(runs, _ROUNDS).items()}
    return {name: (2 * _COPIED if name == "copy" else 2 * _SIDE**3) / took for name, took in best.items()}


def _product(codes: Tensor, packed: linear.PackedLinear) -> Tensor:
    """The operator behind our kernels, without what turns floats into codes."""
    operator = torch.ops.onednn.qlinear_pointwise.default
    weight = (packed.weight, packed.step, packed.zeros)
    out: Tensor = operator(codes, 1.0, 0, *weight, None, 1.0, 0, torch.float32, "none", [], "")
    return out


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"fit": fit, "load": load, "infer": infer, "limits": limits}


def in_child(task: str, *arguments: int, threads: int) -> dict[str, Any]:
    """An error is a result, too."""
    command = [sys.executable, "-m", "bench.scaling", "--threads", str(threads), "--task", task, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def sizes(limit: float) -> Iterator[int]:
    for size in SIZES:
        if size <= limit:
            yield size


def measure(limit: float) -> dict[str, Any]:
    found: dict[str, Any] = {
        "machine": machine(max(THREADS)),
        "limits": {str(threads): in_child("limits", threads=threads) for threads in THREADS},
        "sizes": {},
        "samples": {},
    }
    for samples in COUNTS if limit >= SAMPLED else ():
        found["samples"][str(samples)] = in_child("fit", SAMPLED, samples, threads=max(THREADS))
    for size in sizes(limit):
        print(f"{size:.0e} parameters ...", flush=True)
        found["sizes"][str(size)] = one(size)
        write(found)  # the largest models take longest, and may be given up
    return found


def write(found: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def one(size: int) -> dict[str, Any]:
    """A model that does not fit into memory is reported, not tried."""
    free = psutil.virtual_memory().available
    if size * _NEEDED > free:
        return {"error": f"needs about {size * _NEEDED / 1e9:.0f} GB of memory, and {free / 1e9:.0f} are free"}
    return {
        str(threads): {
            **in_child("fit", size, SAMPLES, threads=threads),
            **in_child("load", size, threads=threads),
            **in_child("infer", size, threads=threads),
        }
        for threads in THREADS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=math.inf, help="the most parameters")
    parser.add_argument("--threads", type=int, default=max(THREADS), help="(internal)")
    parser.add_argument("--task", choices=TASKS, help="(internal) one measurement in this process")
    parser.add_argument("arguments", nargs="*", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.task:
        grads = torch.enable_grad() if options.task == "fit" else torch.inference_mode()
        with grads:
            print(json.dumps(TASKS[options.task](*options.arguments)))
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    write(measure(options.limit))
    print(f"written: {RESULTS}; `make results-docs` puts the figures into the documents")


if __name__ == "__main__":
    main()
