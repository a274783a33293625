"""`make bench`: the figures of the main job, measured in one run, as JSON in `out/bench`; `make results-docs` shows it.

Ratios compare medians of interleaved runs in one process: absolute milliseconds on shared machines mean little.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from examples import dual_path, effnet, minilm
from torch import nn

import pared
from pared import PostTrainingQuantConfig
from pared.runtime.placement import Memory

THREADS = 2
OUT = Path("out/bench")
RESULTS = OUT / "results.json"


EIGHT_BITS = PostTrainingQuantConfig(quant_level=0)


def medians(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, dict[str, float]]:
    """Milliseconds of each, interleaved: median, least and most."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for attempt in range(rounds + warmup):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if attempt >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {n: {"median": statistics.median(t), "least": min(t), "most": max(t)} for n, t in times.items()}


def in_child(task: str, *arguments: str) -> Any:
    """Run one of the tasks below in a process of its own and read its JSON."""
    command = [sys.executable, "-m", "bench.run", "--task", task, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


Pages = Literal["all", "own"]


def resident(pages: Pages = "all") -> int:
    """Bytes of this process in memory; what the C library keeps of freed memory is given back first.

    "own" leaves out pages of files, such as those of PyTorch's libraries, that a first call touches with any model.
    """
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    if pages == "own":
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status["RssAnon"].split()[0])
    return psutil.Process().memory_info().rss


def memory(make: Callable[[], nn.Module], pages: Pages) -> int:
    """Bytes that a model takes once it has been called, so that packed weights count."""
    batch = minilm.calibration(8)[0]
    skeleton, load = minilm.skeleton(), pared.load  # both import what they need
    with torch.inference_mode():
        nn.Linear(64, 64)(torch.zeros(64, 64))  # threads and kernels' own tables
        before = resident(pages)
        model = make()
        model(**batch)
        taken = resident(pages) - before
    del model, skeleton, load
    return taken


def memory_float(pages: Pages = "all") -> int:
    return memory(minilm.load, pages)


def memory_pared(directory: str, kind: Memory = "fast", pages: Pages = "all") -> int:
    return memory(lambda: pared.load(directory, model=minilm.skeleton(), memory=kind), pages)


def import_seconds() -> float:
    """Seconds that `import pared` and its public names take beyond `import torch`."""
    start = time.perf_counter()
    names = [getattr(pared, name) for name in pared.__all__]
    assert names
    return time.perf_counter() - start


def speed(models: Mapping[str, nn.Module], batch: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    ids = torch.randint(1000, 20000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        return medians({name: lambda m=model: m(**inputs) for name, model in models.items()}, rounds)  # type: ignore[misc]  # bound now


def loading(directory: Path) -> dict[str, dict[str, float]]:
    """Loading the artifact beside loading a float state dict, both warm, both into a built skeleton."""
    state = directory / "float.pt"
    torch.save(minilm.load().state_dict(), state)
    skeleton, empty = minilm.load(), minilm.skeleton()

    def plain() -> None:
        skeleton.load_state_dict(torch.load(state, weights_only=True))

    def ours() -> None:
        pared.load(directory, model=empty)

    return medians({"torch": plain, "pared": ours}, 9)


def bench_minilm() -> dict[str, Any]:
    model = minilm.load()
    calibration = minilm.calibration()
    weight_only = pared.fit(model, PostTrainingQuantConfig(approach="weight_only"))
    start = time.perf_counter()
    quick = pared.fit(model, EIGHT_BITS, calibration)
    fit_seconds = time.perf_counter() - start
    directory = OUT / "minilm"
    pared.save(quick, directory / "int8")
    pared.save(weight_only, directory / "weight_only")
    half = minilm.load().bfloat16()
    models = {"float32": model, "bfloat16": half, "pared": quick}
    plain = in_child("memory_float")
    return {
        "bytes": (directory / "int8" / "best_model.pt").stat().st_size,
        "weight_only_bytes": (directory / "weight_only" / "best_model.pt").stat().st_size,
        "float_bytes": 4 * sum(p.numel() for p in model.parameters()),
        "distance_weight_only": minilm.fidelity(weight_only, model),
        "distance_int8": minilm.fidelity(quick, model),
        "score_float": minilm.score(model),
        "score_int8": minilm.score(quick),
        "fit_seconds": fit_seconds,
        "speed_8x128": speed(models, 8, 128, 15),
        "speed_1x32": speed(models, 1, 32, 60),
        "loading": loading(directory / "int8"),
        "memory": {
            "float": plain,
            "weight_only": in_child("memory_pared", str(directory / "weight_only")),
            "int8": in_child("memory_pared", str(directory / "int8")),
        },
        "import_seconds": statistics.median(in_child("import_seconds") for _ in range(5)),
        "kernels": _count(line.kernel for line in quick.plan),  # type: ignore[union-attr]  # ours
    }


def _count(values: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return found


def bench_dual_path() -> dict[str, Any]:
    model = dual_path.load()
    quick = pared.fit(model, EIGHT_BITS, dual_path.calibration())
    directory = OUT / "dual_path"
    path = pared.save(quick, directory)
    torch.save(quick, directory / "object.pt")
    torch.save(quick.state_dict(), directory / "state.pt")
    return {
        "float_bytes": 4 * sum(p.numel() for p in model.parameters()),
        "artifact_bytes": path.stat().st_size,
        "object_bytes": (directory / "object.pt").stat().st_size,
        "state_bytes": (directory / "state.pt").stat().st_size,
        "snr": dual_path.snr(quick, model),
    }


def bench_effnet() -> dict[str, Any]:
    model = effnet.load()
    weight_only = pared.fit(model, PostTrainingQuantConfig(approach="weight_only"))
    quick = pared.fit(model, EIGHT_BITS, effnet.calibration())
    photo = effnet.calibration()[0][:1]
    models = {"float32": model, "bfloat16": effnet.load().bfloat16(), "pared": quick}
    inputs = {name: photo.bfloat16() if name == "bfloat16" else photo for name in models}
    with torch.inference_mode():
        runs: dict[str, Callable[[], object]] = {n: lambda n=n: models[n](inputs[n]) for n in models}  # type: ignore[misc]  # bound now
        times = medians(runs, 30)
    return {
        "float_bytes": 4 * sum(p.numel() for p in model.parameters()),
        "bytes": weight_only.nbytes,
        "kl_weight_only": effnet.kl(weight_only, model),
        "kl_int8": effnet.kl(quick, model),
        "speed": times,
        "kernels": _count(line.kernel for line in quick.plan),  # type: ignore[union-attr]  # ours
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


TASKS: dict[str, Callable[..., Any]] = {
    "memory_float": memory_float,
    "memory_pared": memory_pared,
    "import_seconds": import_seconds,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, help="(internal) run one measurement in this process")
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.task:
        print(json.dumps(TASKS[options.task](*options.arguments)))
        return
    OUT.mkdir(parents=True, exist_ok=True)
    found = {
        "machine": {
            "processor": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "minilm": bench_minilm(),
        "dual_path": bench_dual_path(),
        "effnet": bench_effnet(),
    }
    RESULTS.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"written: {RESULTS}; `make results-docs` puts the figures into the documents")


if __name__ == "__main__":
    main()
